"""A bar for people at a terminal, and nothing for anybody else."""

import os
import pty
import subprocess
import sys

import pytest

from superpipeline.progress import progress

SCRIPT = """
import sys
from superpipeline.progress import progress
with progress(3 * 2**20, "reading weights", quiet=len(sys.argv) > 1) as advance:
    advance(2**20)
    advance(2**20)
print("done")
"""


def on_a_terminal(*arguments: str) -> str:
    """What the script shows on standard error if that is a terminal."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
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


def test_nothing_where_there_is_no_terminal(capfd):
    with progress(10, "reading weights", quiet=False) as advance:
        advance(10)
    assert capfd.readouterr() == ("", "")


def test_errors_pass_through():
    with pytest.raises(ZeroDivisionError), progress(10, "reading weights", quiet=False):
        raise ZeroDivisionError
