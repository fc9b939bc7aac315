"""Updates that are still to be made: of whole blocks, by a worker, until somebody needs a weight.

The step of a lazy optimizer (`optimizer.py`) is cut into updates, one for each block. The worker
carries them out in the order in which the next forward wants them:

    caller    step: submit, hide ──> forward: wait_for(block 0), show, fetch ──> wait_for(block 1) …
    worker         residents, block 0, block 1, block 2, …

[Note: who touches what]
    Between `submit` and `show` the bytes of an update's weights, its gradients and its entries of
    the optimizer's state belong to the worker. It never touches the user's parameters: it has
    tensors of its own over the same bytes. The parameters are re-pointed by callers: to a NaN as
    the update is submitted, so that whoever reads one too early sees it, and back to their bytes
    once it is done. What nobody has waited for when the worker ends, it shows itself.

[Note: who waits]
    a block's fetch                        for the updates of its streamed weights
    the beginning of a pass                for what does not stream, or is read by other blocks too
    a step, of any optimizer               for the updates of the parameters that it steps
    state dicts, weights(), new plans,     for all
    close(), a pass of a new kind
    Whoever waits for an update that failed raises its error, once; the model is as the error says.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from superpipeline.blocks import is_scripted
from superpipeline.errors import UnsupportedError, UpdateError
from superpipeline.masters import Renewal
from superpipeline.siblings import Sibling
from superpipeline.states import Block
from superpipeline.trace import label
from superpipeline.weights import outside_inference_mode
from superpipeline.worker import Worker


class Hidden(NamedTuple):
    """A parameter whose update is pending, with its bytes, and the one NaN that it shows."""

    parameter: torch.Tensor
    data: torch.Tensor
    nan: torch.Tensor


@dataclass(eq=False)
class Update:
    """One block's share of a step.

    Attributes:
        name: the block's, for errors.
        order: updates of lower order are made first.
        blocks: the blocks whose fetch waits for it; if there are none, the next pass does.
        sibling: makes it, on the worker.
        renewal: makes the copies of what was updated anew, there too.
        num_threads: how many threads its operations use: the bits of some sums depend on it.
    """

    name: str
    order: int
    blocks: frozenset[int]
    sibling: Sibling
    renewal: Renewal
    num_threads: int = field(default_factory=torch.get_num_threads)
    with_grad: bool = field(default_factory=torch.is_grad_enabled)
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    hidden: list[Hidden] = field(default_factory=list)

    def run(self) -> None:
        """On the worker."""
        try:
            if torch.get_num_threads() != self.num_threads:
                torch.set_num_threads(self.num_threads)
            with label("update", self.name), torch.set_grad_enabled(self.with_grad):
                self.sibling.step()
                self.renewal.make()
        except BaseException as error:  # noqa: BLE001  (raised by whoever waits)
            self.error = error
        finally:
            self.done.set()

    def hide(self) -> None:
        """Points the parameters at a NaN each; their bytes are the worker's."""
        for parameter in self.sibling.parameters:
            nan = _nan(parameter.dtype)
            self.hidden.append(Hidden(parameter, parameter.data, nan))
            parameter.data = nan.expand(parameter.shape)
            # A graph that saved the weight must not take the new values for it.
            torch.autograd.graph.increment_version(parameter)

    def show(self) -> bool:
        """Points the parameters at their bytes again, where the user has not replaced them.

        True if a NaN was written to: not every operation refuses a tensor that repeats one element.
        """
        for parameter, data, nan in self.hidden:
            if parameter.data_ptr() == nan.data_ptr():
                parameter.data = data
        return not all(nan.isnan() for _, _, nan in self.hidden)


class Updates:
    """The pending updates of one streamed model, and the thread that makes them.

    Attributes:
        stand_ins: addresses that parameters have while they are hidden.
        are_used: whether state dicts are to wait.
    """

    def __init__(self) -> None:
        self.stand_ins: set[int] = set()
        self._pending: list[Update] = []
        self._waiting: list[Update] = []
        self._tokens: SimpleQueue[Update | None] = SimpleQueue()
        self._worker: Worker | None = None
        self._stop: weakref.finalize[..., Updates] | None = None
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._num_open = 0
        self.are_used = False
        _known.append(weakref.ref(self, _known.remove))

    # ---- what waits for what ----------------------------------------------------------------

    def submit(self, update: Update) -> None:
        """Hides the update's parameters and lets the worker make it; see [Note: who touches what].

        Within `none_pending()` it is made before this returns.
        """
        self._check_process()
        with self._lock, outside_inference_mode():
            self._start()
            self._pending.append(update)
            self._waiting.append(update)
            self._tokens.put(update)
            update.hide()
            self.stand_ins.update(hidden.nan.data_ptr() for hidden in update.hidden)
        if self._num_open:
            self.finish()

    def wait_for(self, block: Block) -> None:
        """Before the block's host bytes are read."""
        self._settle(update for update in [*self._pending] if block.index in update.blocks)

    def begin_pass(self) -> None:
        """Before a pass reads anything."""
        if torch.is_inference_mode_enabled():
            self.finish()  # nobody has watched which weights such a pass reads where
        self._settle(update for update in [*self._pending] if not update.blocks or update.error)

    def wait_for_parameters(self, parameters: Iterable[torch.Tensor]) -> None:
        """Before another step, of whichever optimizer."""
        if not self._pending:
            return
        wanted = {id(parameter) for parameter in parameters}
        self._settle(
            update
            for update in [*self._pending]
            if any(id(parameter) in wanted for parameter in update.sibling.parameters)
        )

    def wait_for_borrowers(self) -> None:
        """Before gradients are written in place."""
        self._settle(update for update in [*self._pending] if update.sibling.borrows)

    def finish(self) -> None:
        """Waits for all.

        Raises:
            UpdateError: one of them failed; none is pending any more.
        """
        self._settle(self._pending)

    @contextmanager
    def none_pending(self) -> Iterator[None]:
        """Inside, a step waits for its updates itself."""
        self.finish()
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def _settle(self, updates: Iterable[Update]) -> None:
        chosen = list(updates)
        if not chosen:
            return  # also on the worker, whose updates may be steps of what is hooked like any
        self._check_process()
        errors: list[UpdateError] = []
        with self._lock, outside_inference_mode():
            for update in chosen:
                if update in self._pending:
                    update.done.wait()
                    errors += self._end(update)
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"and: {other}")
            raise errors[0]

    def _end(self, update: Update) -> Iterator[UpdateError]:
        is_written = update.show()
        if update.error is None:
            update.renewal.accept()
        complaint = update.sibling.hand_over()
        self._pending.remove(update)
        self.stand_ins.difference_update(hidden.nan.data_ptr() for hidden in update.hidden)
        if update.error is not None:
            error = UpdateError(
                f"the update of {update.name} failed: {type(update.error).__name__}: "
                f"{update.error}. Its weights and their optimizer state are as it left them; the "
                f"other blocks are updated all the same"
            )
            error.__cause__ = update.error
            yield error
        if is_written:
            complaint = (
                "a weight was written meanwhile, and what was written is lost; write inside `with "
                "superpipeline.handle(model).weights():`"
            )
        if complaint:
            yield UpdateError(f"the pending update of {update.name}: {complaint}")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UnsupportedError(
                "an update of a streamed model's weights is pending in the process that this one "
                "was forked from; fork inside `with superpipeline.handle(model).weights():`"
            )

    # ---- state dicts ------------------------------------------------------------------------

    def guard_state_dicts(self, model: nn.Module) -> list[RemovableHandle]:
        """Makes reading and loading state dicts, of all of `model` or a part, wait first.

        PyTorch's hooks on state dicts are used: unlike hooks on calls they change no code path.
        """
        self.are_used = True
        finish = _Finish(self)
        handles = []
        for module in model.modules():
            if not is_scripted(module):
                handles.append(module.register_state_dict_pre_hook(finish))
                handles.append(module.register_load_state_dict_pre_hook(finish))
        return handles

    # ---- the worker -------------------------------------------------------------------------

    def _start(self) -> None:
        if self._worker is not None and self._worker.is_alive():
            return
        self._tokens = SimpleQueue()
        end = partial(self._tokens.put, None)
        work = partial(_carry_out, self._tokens, self._waiting, self._pending)
        self._worker = Worker(work, "update", end)
        self._stop = weakref.finalize(self, _end_worker, self._worker, os.getpid())

    def close(self) -> UpdateError | None:
        """Waits for all and ends the thread; what has failed is returned. Idempotent."""
        failed = None
        try:
            self.finish()
        except UpdateError as error:
            failed = error
        if self._stop is not None:
            self._stop()
        return failed


class _Finish:
    """A hook that may outlive the updates that it waits for."""

    def __init__(self, updates: Updates) -> None:
        self._updates = weakref.ref(updates)

    def __call__(self, *_: Any) -> None:
        updates = self._updates()
        if updates is not None:
            updates.finish()


def _carry_out(
    tokens: SimpleQueue[Update | None], waiting: list[Update], pending: list[Update]
) -> None:
    """The worker: as often as something is put, it makes the waiting update of the lowest order."""
    while tokens.get() is not None:
        update = min(waiting, key=lambda update: update.order)
        waiting.remove(update)
        update.run()
        del update  # it has gradients
    # Of a model that is collected, and of one at the program's end, parameters live on.
    for update in pending:
        update.show()


def _end_worker(worker: Worker, process: int) -> None:
    """Lets the worker make what is pending, and end."""
    if os.getpid() != process:  # in a forked process it does not exist
        return
    worker.stop()
    if worker is not threading.current_thread():  # which may be who collects the model
        worker.join()


def _nan(dtype: torch.dtype) -> torch.Tensor:
    """A NaN whose bytes are one in any other floating dtype as well: masters show as copies."""
    return torch.full((dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype)[0]


_known: list[weakref.ref[Updates]] = []


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for reference in [*_known]:
        updates = reference()
        if updates is not None:
            updates.wait_for_parameters(
                parameter for group in optimizer.param_groups for parameter in group["params"]
            )


register_optimizer_step_pre_hook(_before_step)
