"""Gradients leave the device as they are made; on the host they are `.grad` when backward returns.

For parameters whose truth is on the host while they compute on another device. (Where the device is
the CPU, PyTorch puts gradients where they belong, and this has nothing to do.)

    begin     a gradient from before is set aside: PyTorch would add the new one to it in place
    take      a hook after accumulation: OFFLOAD waits for the gradient and copies it out
    land      its copy is done: the host adds it to what was there, in the order of arrival, as
              PyTorch would; only then is the device's memory let go
    end       every gradient has landed and becomes `.grad`

[Note: gradients in flight]
    A gradient's device memory must outlive its copy, so it is held here until the copy's event has
    happened. Before more than `most_bytes` are held, the host waits for the oldest.

[Note: who lands]
    A thread, one gradient after the other: autograd's own thread would issue no kernels meanwhile.
    While a backward runs only that thread touches sums and gradients from before, and `end` and
    `drop` wait until it has no more to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from superpipeline.host import HostBuffer
from superpipeline.streams import COMPUTE, OFFLOAD, Leaving, Streams
from superpipeline.trace import Counters, label
from superpipeline.weights import Weight


def leave(device: torch.device) -> bool:
    """Whether gradients have to be taken from `device` to the host."""
    return device.type != "cpu"


def leaving(
    weights: Iterable[Weight], streams: Streams, counters: Counters, most_bytes: int
) -> Gradients | None:
    """What takes the gradients of `weights` to the host; None where they are there."""
    if not leave(streams.device):
        return None
    aliases = (alias for weight in weights for alias in weight.aliases if not alias.is_buffer)
    parameters = {id(alias.tensor): alias.tensor for alias in aliases}
    return Gradients(parameters.values(), streams, counters, most_bytes)


class _Flight(NamedTuple):
    """A gradient on its way: `there` on the device, `here` on the host; `copied` is an event."""

    parameter: torch.Tensor
    there: torch.Tensor
    here: torch.Tensor
    copied: Any


class Adder(Protocol):
    """Adds gradients up on the host."""

    def dtype(self, parameter: torch.Tensor, made: torch.dtype) -> torch.dtype:
        """What a gradient made in `made` is to arrive in."""

    def add(
        self, parameter: torch.Tensor, old: torch.Tensor | None, new: torch.Tensor
    ) -> torch.Tensor:
        """The sum, in place in `old` if there is one; else `new` may be taken."""

    def give(self, parameter: torch.Tensor, total: torch.Tensor) -> None:
        """The backward has ended: `total` becomes the gradient."""


class _Plain:
    """As PyTorch does: in place, so whoever holds the old gradient sees the sum."""

    def dtype(self, parameter: torch.Tensor, made: torch.dtype) -> torch.dtype:
        del parameter
        return made

    def add(
        self, parameter: torch.Tensor, old: torch.Tensor | None, new: torch.Tensor
    ) -> torch.Tensor:
        del parameter
        return new if old is None else old.add_(new)

    def give(self, parameter: torch.Tensor, total: torch.Tensor) -> None:
        parameter.grad = total


class Gradients:
    """The gradients of one engine's parameters that stay on the host.

    Costs on the device at most `most_bytes` and the largest gradient; on the host, pinned, the
    gradients' bytes, reused from step to step.

    Attributes:
        parameters: whose gradients leave.
        adder: adds them up.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], streams: Streams, counters: Counters,
        most_bytes: int,
    ) -> None:  # fmt: skip
        self.parameters = list(parameters)
        self._streams = streams
        self._counters = counters
        self._most_bytes = most_bytes
        self._memory = HostPool(streams.device)
        self._hooked: dict[int, Any] = {}
        self._before: dict[int, torch.Tensor] = {}
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # On the CPU (where simulated devices are) gradients land when they are waited for.
        on_cpu = streams.device.type == "cpu"
        self._lander = None if on_cpu else ThreadPoolExecutor(1, "superpipeline-gradients")
        self._flights: deque[tuple[_Flight, Future[None] | None]] = deque()
        self._in_flight = 0
        self.is_taking = False
        self.adder: Adder = _Plain()

    def begin(self) -> None:
        """Before the first node of a backward runs."""
        for parameter in self.parameters:
            if not parameter.requires_grad:
                continue
            if id(parameter) not in self._hooked:
                hook = parameter.register_post_accumulate_grad_hook(self._take)
                self._hooked[id(parameter)] = hook
            if parameter.grad is not None:
                self._before[id(parameter)] = parameter.grad
                parameter.grad = None
        self.is_taking = True

    def end(self) -> None:
        """The backward has ended, and the parameters show the host's bytes again."""
        while self._flights:
            self._wait_for_oldest()
        self.is_taking = False
        for parameter, total in self._sums.values():
            self.adder.give(parameter, total)
        self._give_back()
        self._sums.clear()

    def drop(self) -> None:
        """The backward failed: each gradient is as before, or with what was added to it by then."""
        while self._flights:
            flight, landing = self._flights.popleft()  # its memory must outlive the copy
            self._streams.synchronize_event(flight.copied)
            if landing is not None:
                wait([landing])
        self._in_flight = 0
        self.is_taking = False
        self._sums.clear()  # first: those from before are given back, whatever landed
        self._give_back()

    def close(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooked.values():
            hook.remove()
        self._hooked.clear()
        if self._lander is not None:
            self._lander.shutdown(wait=False)

    def _give_back(self) -> None:
        for parameter in self.parameters:
            if id(parameter) in self._before:
                old = self._before.pop(id(parameter))
                if id(parameter) not in self._sums:
                    parameter.grad = old

    # ---- one gradient ---------------------------------------------------------------------------

    def is_own(self, hook: object) -> bool:
        """Whether `hook` is what takes a gradient."""
        return hook == self._take

    def _take(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or not self.is_taking:
            return
        parameter.grad = None
        with label("offload", "gradient"), torch.inference_mode(False), torch.no_grad():
            # Converted on the device: the host would need longer than the link for twice the bytes.
            gradient = gradient.to(self.adder.dtype(parameter, gradient.dtype))
            here = self._memory.like(gradient)
            # Protects the copy from reading a gradient that is still being computed.
            self._streams.wait(OFFLOAD, self._streams.record(COMPUTE))
            self._streams.copy_out([Leaving(here, gradient)])
            copied = self._streams.record(OFFLOAD)
        self._send(_Flight(parameter, gradient, here, copied))
        while self._flights and (self._is_too_much() or self._has_landed()):
            self._wait_for_oldest()

    def _send(self, flight: _Flight) -> None:
        landing = None if self._lander is None else self._lander.submit(self._land, flight)
        self._flights.append((flight, landing))
        self._in_flight += flight.there.nbytes
        peak = max(self._counters.gradient_bytes_peak, self._in_flight)
        self._counters.gradient_bytes_peak = peak

    def _is_too_much(self) -> bool:
        return self._in_flight > self._most_bytes and len(self._flights) > 1

    def _has_landed(self) -> bool:
        landing = self._flights[0][1]
        return landing is not None and landing.done()

    def _wait_for_oldest(self) -> None:
        flight, landing = self._flights.popleft()
        self._in_flight -= flight.there.nbytes
        if landing is None:
            self._land(flight)
        else:
            landing.result()

    def _land(self, flight: _Flight) -> None:
        """Waits for the copy and adds it up; see [Note: who lands]."""
        self._streams.synchronize_event(flight.copied)
        key = id(flight.parameter)
        old = self._sums[key][1] if key in self._sums else self._before.get(key)
        with label("add", "gradient"), torch.inference_mode(False), torch.no_grad():
            total = self.adder.add(flight.parameter, old, flight.here)
        self._sums[key] = (flight.parameter, total)


class HostPool:
    """Host memory lent out by exact size, and lent again once nobody looks at it.

    Pinned where the device is a GPU. (PyTorch's own pinned allocator rounds up to powers of two.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lent: dict[int, list[tuple[HostBuffer, StorageWeakRef]]] = {}

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory on the host for a copy of `tensor`, with its strides if they are dense."""
        stride = torch.empty_like(tensor, device="meta").stride()
        flat = self._take(max(tensor.nbytes, 1))
        begin = flat.storage_offset() // tensor.itemsize
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(flat.untyped_storage(), begin, tensor.size(), stride)

    def _take(self, num_bytes: int) -> torch.Tensor:
        known = self._lent.setdefault(num_bytes, [])
        free = (index for index, (_, borrower) in enumerate(known) if borrower.expired())
        index = next(free, None)
        if index is not None:
            buffer, _ = known.pop(index)
        else:
            on_gpu = self._device.type == "cuda"
            buffer = HostBuffer([], num_bytes=num_bytes, is_shared=on_gpu)
            buffer.pin(self._device)
        flat = buffer.lend()
        known.append((buffer, StorageWeakRef(flat.untyped_storage())))
        return flat
