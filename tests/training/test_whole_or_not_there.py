"""A checkpoint is whole or not there: kills at any moment, power cuts, full disks, Ctrl-C."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from superpipeline import DiskError
from superpipeline.resume import load_checkpoint, save_checkpoint
from superpipeline.versions import INDEX
from training import saving
from training.reference import assert_same_tensors
from training.saving import assert_clean, stepped, tensors_of


def assert_nothing_half_written(folder: Path) -> None:
    """Every file that does not say that it is unfinished is whole, whoever may come to read it."""
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert len(file.keys()) == saving.NUM_TENSORS
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["weight_map"]
        else:
            assert path.suffix == ".unfinished", path


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[saving.Saver]:
    with saving.Saver(tmp_path / "run") as found:
        yield found


def expect_whole(saver: saving.Saver) -> None:
    """What loads is one version, and no older than the last that was done."""
    assert_nothing_half_written(saver.folder)
    done = saver.steps_done()
    step = saving.load_step(saver.folder)
    assert done <= step <= done + 1, f"{done} was done, {step} is there"


def test_kill_at_random_moments(saver: saving.Saver) -> None:
    """Each time the process goes on from what the one before left, whatever that is."""
    generator = random.Random(5)
    for _ in range(40):
        before = saver.steps_done()
        with saver.saving() as process:
            while saver.steps_done() == before:
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.05))
            os.kill(process, signal.SIGKILL)
        expect_whole(saver)
    assert saver.steps_done() >= 40
    saver.save_once()
    assert_clean(saver.folder, 4)


def test_kill_before_every_line(saver: saving.Saver) -> None:
    """Of `versions.py`, where the order of things is what makes it safe."""
    saver.save_once()
    num_lines = saver.count_lines()
    assert num_lines > 80
    seen, left = set(), set()
    for line in range(1, num_lines + 1):
        before = saving.load_step(saver.folder)
        with saver.saving(kill_before=line):
            pass
        assert_nothing_half_written(saver.folder)
        step = saving.load_step(saver.folder)
        seen.add(step - before)
        left.add(sum(1 for _ in saver.folder.iterdir()))
    assert seen == {0, 1}
    assert max(left) > 4, "no kill left anything behind"
    saver.save_once()
    assert_clean(saver.folder, 4)


def test_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written; a power cut does. So each file is on the disk before
    it gets its name, names are before the index names them, and the index before what it replaces
    goes."""
    model, optimizer = stepped()
    save_checkpoint(tmp_path, model, optimizer=optimizer)
    old = {path.name for path in tmp_path.glob("*-*")}
    done: list[tuple[str, str]] = []

    def noting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            what = args[0] if isinstance(args[0], str | Path) else f"/proc/self/fd/{args[0]}"
            done.append((name, Path(what).resolve().name))
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    save_checkpoint(tmp_path, model, optimizer=optimizer)
    monkeypatch.undo()
    new = [path.name for path in tmp_path.glob("*-*")]
    folder = [at for at, event in enumerate(done) if event == ("fsync", tmp_path.name)]
    index = done.index(("replace", f"{INDEX}.unfinished"))
    assert done.index(("fsync", f"{INDEX}.unfinished")) < index
    for name in new:
        renamed = done.index(("rename", f"{name}.unfinished"))
        assert done.index(("fsync", f"{name}.unfinished")) < renamed < folder[0] < index < folder[1]
    assert len(old) == len(new) == 3
    assert all(done.index(("unlink", name)) > folder[1] for name in old)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond that fails, as on a full disk; in the meantime nothing else may write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fails", ["model", "state.optimizer", "state"])
def test_a_full_disk_leaves_what_there_was(fails: str, tmp_path: Path) -> None:
    """Each file in turn is the first that does not fit."""
    model, optimizer = stepped()
    notes = torch.arange(8_000, dtype=torch.int32)
    state = {"optimizer": optimizer, "notes": notes}
    save_checkpoint(tmp_path / "sizes", model, **state)
    (path,) = (tmp_path / "sizes").glob(f"{fails}-*")
    save_checkpoint(tmp_path / "run", model, optimizer=optimizer, step=1)
    expected = tensors_of(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    with largest_file(path.stat().st_size - 1), pytest.raises(DiskError, match="File too large"):
        save_checkpoint(tmp_path / "run", model, **state)
    assert_clean(tmp_path / "run", 4)
    assert load_checkpoint(tmp_path / "run", model, optimizer=optimizer) == {"step": 1}
    assert_same_tensors("weight", tensors_of(model), expected)
    save_checkpoint(tmp_path / "run", model, **state)


def test_ctrl_c_leaves_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stepped()
    save_checkpoint(tmp_path, model, step=1)

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, model, optimizer=optimizer, step=2)
    assert_clean(tmp_path, 3)
    assert load_checkpoint(tmp_path, model) == {"step": 1}


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    model, _ = stepped()
    others = ["config.json", "model-00001-of-00002.safetensors", "state.pt", "notes-0123.pt"]
    for name in others:
        (tmp_path / name).write_text("{}")
    ours = ["state-0123456789abcdef.pt", "model-0123456789abcdef.safetensors.unfinished"]
    for name in ours:
        (tmp_path / name).write_text("half")
    save_checkpoint(tmp_path, model)
    names = {path.name for path in tmp_path.iterdir()}
    assert set(others) <= names
    assert not names & set(ours)
    assert INDEX in names
    assert len([name for name in names if re.fullmatch(r"state-\w{16}\.pt", name)]) == 1


def test_a_reader_keeps_the_version_that_it_opened(tmp_path: Path) -> None:
    """Another process may save meanwhile; what is read is one version or the other."""
    from superpipeline.versions import reading

    model, _ = stepped()
    save_checkpoint(tmp_path, model, step=1)
    with reading(tmp_path) as version:
        save_checkpoint(tmp_path, model, step=2)
        rest = torch.load(version.files["state.pt"], weights_only=True)
    assert rest["plain"] == {"step": 1}
