"""A bar for people at a terminal, and nothing for anybody else."""

import os
import pty
import subprocess
import sys

import pytest

from model_folder import make_folder
from superpipeline.progress import bars, progress

SCRIPT = """
import sys
from superpipeline.progress import bars, progress
with bars(quiet=len(sys.argv) > 1), progress(3 * 2**20, "reading weights") as advance:
    advance(2**20)
    advance(2**20)
print("done")
"""


def on_a_terminal(*arguments: str, script: str = SCRIPT) -> str:
    """What the script shows on standard error if that is a terminal."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
            stdout=subprocess.PIPE,
            stderr=theirs,
            check=True,
        )
        assert done.stdout == b"done\n"
        os.set_blocking(ours, False)
        try:
            return os.read(ours, 1 << 16).decode()
        except BlockingIOError:
            return ""
    finally:
        os.close(ours)
        os.close(theirs)


def test_bytes_are_shown_on_a_terminal():
    shown = on_a_terminal()
    assert "superpipeline: reading weights" in shown
    assert "2.0/3.0 MiB" in shown


def test_nothing_if_quiet():
    assert on_a_terminal("quiet") == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_load_shows_what_it_reads(quiet, tmp_path):
    script = f"""
import superpipeline
superpipeline.load({str(make_folder(tmp_path, chat=False))!r}, "60%", device="cpu", quiet={quiet})
print("done")
"""
    shown = on_a_terminal(script=script)
    assert ("superpipeline: reading into host memory" in shown) is not quiet
    assert ("superpipeline: reading what stays on the device" in shown) is not quiet


def test_nothing_where_there_is_no_terminal(capfd):
    with bars(quiet=False), progress(10, "reading weights") as advance:
        advance(10)
    assert capfd.readouterr() == ("", "")


def test_nothing_where_nobody_waits(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(10, "reading weights") as advance:
        advance(10)
    with bars(quiet=False):
        pass
    with progress(10, "reading weights") as advance:
        advance(10)
    with bars(quiet=False), progress(0, "nothing") as advance:
        advance(0)
    assert capfd.readouterr() == ("", "")


def test_errors_pass_through():
    with pytest.raises(ZeroDivisionError), bars(quiet=False), progress(10, "reading weights"):
        raise ZeroDivisionError
