"""What tests of checkpoints need: runs that save, and processes that save until they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import nn

import superpipeline
from superpipeline import versions
from superpipeline.resume import load_checkpoint, save_checkpoint

NUM_TENSORS = 6
TESTS = Path(__file__).parents[1]


# ---- what several tests need --------------------------------------------------------------------


def python(code: str, **environment: str) -> str:
    """What a process prints that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in everything_in(model).items()}


def everything_in(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    optimizer = adamw(model.parameters())
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    return model, optimizer


def assert_clean(folder: Path, num_files: int) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == num_files, names
    assert not any(name.endswith(".unfinished") for name in names)


# ---- a run in a process of its own --------------------------------------------------------------


def losses(folder: str | Path, begin: int, end: int) -> list[str]:
    """The losses of these steps, bit by bit; goes on from the folder's checkpoint, and saves."""
    from training.cases import CASES
    from training.side_by_side import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how many share a sum is part of the bits
    torch.manual_seed(7 + begin)
    model = superpipeline.stream(CASES["dropout"].build(), "50%", device="cpu", quiet=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lazy = superpipeline.handle(model).optimizer(optimizer)
    if begin:
        assert load_checkpoint(folder, model, optimizer=lazy) == {"step": begin}
    seen = train(model, lazy, range(begin, end))
    save_checkpoint(folder, model, optimizer=lazy, step=end)
    torch.set_num_threads(threads)
    return [tensor.item().hex() for tensor in seen.values()]


# ---- a model whose every number is the step -----------------------------------------------------


def _at_step(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.ParameterList(nn.Parameter(torch.empty(64, 64)) for _ in range(NUM_TENSORS))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for parameter in model.parameters():
        parameter.data.fill_(step)
        optimizer.state[parameter] = {"momentum_buffer": torch.full_like(parameter, step)}
    return model, optimizer


def load_step(folder: Path) -> int:
    """The step that the checkpoint was saved at; asserts that all of it is of that step."""
    model, optimizer = _at_step(-1)
    step = load_checkpoint(folder, model, optimizer=optimizer)["step"]
    for parameter in model.parameters():
        assert (parameter == step).all()
        assert (optimizer.state[parameter]["momentum_buffer"] == step).all()
    return step


class Saver:
    """Forks processes that save such models, one at a time, from one that has imported torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._notes = folder.with_name("notes")
        self._notes.write_text("0")

    def __enter__(self) -> Self:
        code = f"from training import saving; saving.serve({str(self.folder)!r})"
        self._server = subprocess.Popen(
            [sys.executable, "-c", code], cwd=TESTS, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=60)

    @contextmanager
    def saving(self, **asked: Any) -> Iterator[int]:
        """A process that saves again and again; afterwards it has ended, by a kill if not by
        itself."""
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        yield int(self._server.stdout.readline())
        code = int(self._server.stdout.readline())
        assert code == (0 if asked.get("once") else -signal.SIGKILL), code

    def save_once(self) -> None:
        with self.saving(once=True):
            pass

    def steps_done(self) -> int:
        """The step of the last save that returned."""
        return int(self._notes.read_text() or -1)

    def count_lines(self) -> int:
        """How many lines of `versions.py` a save executes."""
        with self.saving(once=True, counts=True):
            pass
        return int(self._notes.with_name("lines").read_text())


def serve(folder: str) -> None:
    """For each line that comes in: forks, says which process it is, waits, says how it ended."""
    with tempfile.TemporaryDirectory() as other:  # the first time takes a second, of imports
        model, optimizer = _at_step(0)
        save_checkpoint(other, model, optimizer=optimizer, step=0)
        load_step(Path(other))
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                _save(Path(folder), **json.loads(line))
                code = 0
            except BaseException:  # noqa: BLE001  (nothing of the parent may run here)
                traceback.print_exc()
            finally:
                os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _save(folder: Path, *, once: bool = False, kill_before: int = 0, counts: bool = False) -> None:
    notes = os.open(folder.with_name("notes"), os.O_WRONLY)
    step = load_step(folder) if folder.exists() else 0
    while True:
        step += 1
        model, optimizer = _at_step(step)
        lines = _Lines(kill_before)
        if counts or kill_before:
            sys.settrace(lines.trace)
        save_checkpoint(folder, model, optimizer=optimizer, step=step)
        sys.settrace(None)
        os.pwrite(notes, b"%08d" % step, 0)
        if counts:
            folder.with_name("lines").write_text(str(lines.count))
        if once:
            return
        if kill_before:
            os.kill(os.getpid(), signal.SIGKILL)


class _Lines:
    """Counts the lines of `versions.py` that are executed; kills before one of them."""

    def __init__(self, last: int) -> None:
        self.count = 0
        self._last = last

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != versions.__file__:
            return None
        if event == "line":
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace
