"""What an update reads, what is refused, what a failed one leaves, and how the worker ends."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

import superpipeline
from superpipeline import UnsupportedError, UpdateError
from superpipeline.gradients import HostPool
from superpipeline.siblings import Sibling
from training.cases import CASES
from training.gates import PATIENCE_S, Gated, Strict, after_one_step, closed_gate, streamed
from training.pending import open_soon, pending
from training.reference import Tensors, assert_same_tensors, weights_of
from training.side_by_side import everything, loss_of, side_by_side, train

# ---- what an update reads -----------------------------------------------------------------------


def borrow(model: nn.Module) -> None:
    """Gradients in memory that PyTorch cannot copy on write, as pinned memory is."""
    for parameter in model.parameters():
        parameter.grad = torch.from_numpy(parameter.grad.numpy().copy())


@pytest.mark.parametrize("to_none", [True, False])
def test_borrowed_gradients(*, to_none: bool) -> None:
    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        lazily.append(True)
        losses: Tensors = {}
        for index in range(4):
            loss = loss_of(model, index)
            loss.backward()
            borrow(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            losses[f"loss {index}"] = loss.detach()
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)


def test_a_borrowed_gradient_is_not_changed_unseen() -> None:
    model, handle = streamed()
    with closed_gate() as gate:
        base = Gated(model.parameters(), lr=0.1)
        optimizer = handle.optimizer(base, per_parameter=True)
        loss_of(model).backward()
        borrow(model)
        optimizer.step()
        model.layers[3].up.weight.grad.mul_(0.5)
        gate.set()
        with pytest.raises(UpdateError, match=r"layers\.3.*gradient"):
            loss_of(model)
    loss_of(model)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_adafactor_of_two_dtypes(first: torch.dtype, *, foreach: bool) -> None:
    """Its epsilon is that of the first parameter's dtype, for the whole group."""
    second = torch.bfloat16 if first is torch.float32 else torch.float32

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dtypes = [first] * 2 + [second] * 3
            self.layers = nn.ModuleList(nn.Linear(128, 128, dtype=d) for d in dtypes)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                hidden = layer(hidden.to(layer.weight.dtype))
            return hidden

    def build() -> nn.Module:
        torch.manual_seed(5)
        return Mixed()

    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = torch.optim.Adafactor(model.parameters(), foreach=foreach)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        lazily.append(True)
        losses: Tensors = {}
        for index in range(4):
            loss = model(torch.full((4, 128), 0.3)).float().square().mean() * 1e-7
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[f"loss {index}"] = loss.detach()
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script, build)


class Sharing(torch.optim.SGD):
    """As the bits of a mean do, its update depends on how many threads share the work."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(0.01 * torch.get_num_threads())
        return super().step(closure)


def test_as_many_threads_as_the_step_had() -> None:
    """A thread keeps the number that it began with, whatever is set on another."""

    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = Sharing(model.parameters(), lr=1e-2)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer, per_parameter=True)
        lazily.append(True)
        losses: Tensors = {}
        for index, num_threads in enumerate([2, 1, 2, 1]):
            loss_of(model, index).backward()
            torch.set_num_threads(num_threads)
            optimizer.step()
            optimizer.zero_grad()
            torch.set_num_threads(before)
        return everything(model, losses)

    lazily: list[bool] = []
    before = torch.get_num_threads()
    try:
        side_by_side(script)
    finally:
        torch.set_num_threads(before)


class GatedAdamW(torch.optim.AdamW):
    """Waits as Gated does."""

    def step(self, closure: Any = None) -> Any:
        Gated.gate.wait(30)
        return super().step(closure)


@pytest.mark.parametrize("infinite", [0.0, 1.0])
def test_what_a_scaler_sets_is_read_at_the_step(infinite: float) -> None:
    plain = CASES["dropout"].build()
    model, handle = streamed()
    found = []
    for target in (plain, model):
        base = GatedAdamW(target.parameters(), fused=True)
        optimizer = handle.optimizer(base, per_parameter=True) if target is model else base
        torch.manual_seed(1)
        loss_of(target).backward()
        scale, found_inf = torch.tensor(2.0), torch.tensor(infinite)
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        with closed_gate() if target is model else nullcontext():
            optimizer.step()
            scale.fill_(1e9)
            found_inf.fill_(1 - infinite)
            del optimizer.grad_scale, optimizer.found_inf
        with handle.weights():
            found.append(weights_of(target))
    assert_same_tensors("weight", found[1], found[0])


def test_a_scheduler_of_the_optimizer_it_was_made_from() -> None:
    """And neither warns that it is stepped before the optimizer."""

    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        lazily.append(True)
        losses: Tensors = {}
        for index in range(4):
            losses |= train(model, optimizer, range(index, index + 1))
            schedule.step()
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)


# ---- what is refused, and what fails ------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Keeps a number in its groups, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_one_that_counts_in_its_groups_is_refused() -> None:
    model, handle = streamed()
    optimizer = handle.optimizer(Counting(model.parameters(), lr=0.1), per_parameter=True)
    loss_of(model).backward()
    optimizer.step()
    with pytest.raises(UpdateError, match=r"writes param_groups\[0\]\['k'\]"):
        loss_of(model)


@pytest.mark.parametrize("copies", [copy.deepcopy, copy.copy, lambda o: o.__reduce_ex__(2)])
def test_copies_are_refused(copies: Callable[[Any], Any]) -> None:
    model, handle = streamed()
    optimizer = handle.optimizer(torch.optim.AdamW(model.parameters()))
    with pytest.raises(UnsupportedError, match="state_dict"):
        copies(optimizer)


def test_a_step_within_a_forward_is_refused() -> None:
    model, handle = streamed()
    optimizer = handle.optimizer(torch.optim.AdamW(model.parameters()))
    loss_of(model).backward()
    hook = model.layers[2].register_forward_hook(lambda *_: optimizer.step())
    with pytest.raises(UnsupportedError, match="within a forward"):
        loss_of(model)
    hook.remove()
    train(model, optimizer, range(2))


def test_what_a_failed_update_leaves() -> None:
    """All blocks but one are updated, that one is as it was, and training goes on."""
    model, handle = streamed()
    base = Strict(model.parameters(), lr=0.1)
    optimizer = handle.optimizer(base, per_parameter=True)
    torch.manual_seed(1)
    loss_of(model).backward()
    expected = CASES["dropout"].build()
    for mine, parameter in zip(expected.parameters(), model.parameters(), strict=True):
        mine.grad = parameter.grad.clone()
    expected.layers[3].up.weight.grad = expected.layers[3].down.weight.grad = None
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    model.layers[3].up.weight.grad.fill_(float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(UpdateError, match=r"layers\.3 failed") as found:
        handle.close()
    assert isinstance(found.value.__cause__, FloatingPointError)
    actual = weights_of(model)
    same = {n: t for n, t in actual.items() if n.endswith((".up.weight", ".down.weight"))}
    wanted = weights_of(expected)
    assert_same_tensors("weight", same, {name: wanted[name] for name in same})
    train(model, optimizer, range(2))


# ---- threads and processes ----------------------------------------------------------------------


def workers() -> set[threading.Thread]:
    """Those alive; of models of other tests some may be about to end."""
    return {thread for thread in threading.enumerate() if thread.name == "superpipeline-update"}


def test_close_ends_the_worker() -> None:
    before = workers()
    model, handle = streamed()
    optimizer = handle.optimizer(torch.optim.AdamW(model.parameters()))
    assert workers() <= before, "nothing to do yet"
    train(model, optimizer, range(2))
    assert len(workers() - before) == 1
    handle.close()
    assert workers() <= before


def test_a_model_that_is_collected_leaves_updated_parameters() -> None:
    gc.collect()
    before = workers()
    with closed_gate() as gate:
        model, handle, optimizer = pending()
        parameters = dict(model.named_parameters())
        gone = weakref.ref(handle)
        timer = open_soon(gate, 2.0)
        del model, handle, optimizer
        gc.collect()
        found: Tensors = {name: p.detach().clone() for name, p in parameters.items()}
        timer.join()
    assert gone() is None
    assert workers() <= before
    assert_same_tensors("weight", found, after_one_step(torch.optim.SGD))


class Collecting(Gated):
    """Its update collects garbage, as any update may."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        gc.collect()
        return result


def test_a_model_that_the_worker_itself_collects() -> None:
    """A thread cannot wait for its own end: parameters showed NaN for good."""
    gc.collect()
    before = workers()
    with closed_gate() as gate:
        model, handle = streamed("50%")
        optimizer = handle.optimizer(
            Collecting(model.parameters(), lr=0.1, momentum=0.9), per_parameter=True
        )
        torch.manual_seed(1)
        loss_of(model).backward()
        optimizer.step()
        parameters = dict(model.named_parameters())
        gone = weakref.ref(handle)
        gc.disable()  # of this thread
        try:
            del model, handle, optimizer
            gate.set()
            deadline = time.monotonic() + PATIENCE_S
            while workers() - before and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            gc.enable()
    assert gone() is None
    found: Tensors = {name: p.detach().clone() for name, p in parameters.items()}
    assert_same_tensors("weight", found, after_one_step(torch.optim.SGD))


END_AFTER_A_STEP = """
import os, sys
import torch
import superpipeline

def train(num_steps):
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(40)])
    handle = superpipeline.handle(superpipeline.stream(model, k=2, device="cpu", quiet=True))
    optimizer = handle.optimizer(torch.optim.AdamW(model.parameters()))
    for _ in range(num_steps):
        model(torch.ones(2, 512)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle

train(2).close()  # imports what there is to import; its threads have ended
times = int(sys.argv[1])
for count in range(times):
    if os.fork() == 0:
        train(1 + count % 2)
        sys.exit(count)  # while updates are under way
statuses = sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(times))
assert statuses == list(range(times)), statuses
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_program_may_end_right_after_a_step(times: int) -> None:
    """A thread that comes back from torch while the interpreter ends aborts the process."""
    result = subprocess.run(
        [sys.executable, "-c", END_AFTER_A_STEP, str(times)],
        check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")


UPDATED_AT_EXIT = """
import atexit
import sys
import torch
from training.gates import Gated, after_one_step
from training.pending import open_soon, pending
from training.reference import assert_same_tensors, weights_of

print("begun", file=sys.stderr, flush=True)  # libraries may warn while they are imported
model, handle, optimizer = pending()
open_soon(Gated.gate)
atexit.register(lambda: print("looked"))
atexit.register(
    lambda: assert_same_tensors("weight", weights_of(model), after_one_step(torch.optim.SGD))
)
from superpipeline import worker
atexit.register(worker._stop_all)  # the last one registered is the first to be called
"""


def test_what_is_pending_at_the_programs_end_is_made() -> None:
    """Who saves a model at exit saves the weights of the last step, not NaN."""
    result = subprocess.run(
        [sys.executable, "-c", UPDATED_AT_EXIT], check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    _, begun, errors = result.stderr.partition("begun\n")
    assert (result.returncode, begun, errors) == (0, "begun\n", ""), result.stderr
    assert result.stdout == "looked\n"


# ---- gradients in two threads -------------------------------------------------------------------


def test_neither_thread_holds_the_last_copy_of_a_gradient() -> None:
    """PyTorch's copies on write may not be given up by two threads at once: a worker hung in
    `p.grad = None`, in one of some thousand ten-step runs, and the process crashed later."""
    with closed_gate() as gate:
        model, handle, optimizer = pending("k2")
        optimizer.zero_grad()
        siblings = [update.sibling for update in handle.updates._pending]
        kept = [StorageWeakRef(t.untyped_storage()) for t in all_kept(siblings)]
        assert len(kept) == len(list(model.parameters()))
        gate.set()
        for update in handle.updates._pending:
            update.done.wait()
        assert len(list(all_kept(siblings))) == len(kept)
    handle.updates.finish()
    assert not list(all_kept(siblings))
    assert all(gradient.expired() for gradient in kept)


def all_kept(siblings: list[Any]) -> Iterator[torch.Tensor]:
    for sibling in siblings:
        for twin in sibling._twins.values():
            yield from twin.kept


@pytest.mark.slow
def test_two_threads_give_gradients_up_at_once() -> None:
    """Without the third copy this hangs within half a minute, most times."""
    parameters = [nn.Parameter(torch.zeros(64)) for _ in range(50)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    queue: SimpleQueue[Any] = SimpleQueue()

    def give_up() -> None:
        while (item := queue.get()) is not None:
            sibling, done = item
            for twin in sibling._twins.values():
                twin.tensor.grad = None
            done.set()

    memory = HostPool(torch.device("cpu"))
    thread = threading.Thread(target=give_up)
    thread.start()
    before, deadline = sys.getswitchinterval(), time.monotonic() + 60
    sys.setswitchinterval(1e-6)
    try:
        while time.monotonic() < deadline:
            for parameter in parameters:
                parameter.grad = torch.ones(64)
            groups = [{"params": parameters}]
            sibling, done = Sibling(optimizer, groups, optimizer, memory), Event()
            queue.put((sibling, done))
            for parameter in parameters:
                parameter.grad = None
            assert done.wait(PATIENCE_S)
            sibling.hand_over()
    finally:
        sys.setswitchinterval(before)
        queue.put(None)
    thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_ever() -> None:
    def child(answers: Any) -> None:
        try:
            model.state_dict()
        except UnsupportedError as error:
            answers.put(str(error))
        else:
            answers.put("no error")

    with closed_gate():
        model, handle, _ = pending()
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        process = context.Process(target=child, args=(answers,))
        process.start()
        process.join(60)
        assert "forked" in answers.get()
    handle.close()
    assert_same_tensors("weight", weights_of(model), after_one_step(torch.optim.SGD))
