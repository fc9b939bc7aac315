"""What autograd saves in a block's call goes to the host, and comes back for its backward.

    open        the call runs; what it saves stays where it is
    leaving     the call has ended: OFFLOAD copies the spans to the host
    away        on the host only
    coming      FETCH copies the whole stash, while the backward of the call after it runs
    here        at the strides and the alignment that it had, until another stash is here

      COMPUTE  C0 ── C1 ─── C2 ─w(S0 out)─ B2 ──── w(S1 in)─ B1 ──── w(S0 in)─ B0
      OFFLOAD        └S0──┐ └S1 ...          │                │
      FETCH               ...                └S1────┘         └S0────┘

The last stash of a forward is still there when the backward begins.

[Note: who orders whom, of stashes]
    a copy to the host    after what COMPUTE has done so far. That protects it from values that are
                          not there yet, and copies that still read the host's memory: COMPUTE has
                          waited for them
    the device's memory   is held until COMPUTE has waited for the copy to the host, which is when
                          the next stash leaves: at most two calls' spans are on the device
    a copy back           after what COMPUTE has done so far: kernels may still use what its memory
                          was before. COMPUTE has waited for the copy to the host as well
    a read                after the copy back; and so is giving its memory up unread

Where the device is the CPU all this happens from memory to memory, which is of no use but that it
is tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from superpipeline.saved import Kept, Packed, Way, Witness
from superpipeline.stash import (
    HostMemory,
    Layout,
    Span,
    Stash,
    give_device_places,
    give_host_places,
)
from superpipeline.streams import COMPUTE, FETCH, OFFLOAD, Streams
from superpipeline.trace import label

# Below this a copy costs more than the memory is worth: on a GPU 5 µs to issue.
LEAST_BYTES = {"cuda": 64 * 1024, "cpu": 1024}


class Away(Packed):
    """Stands in autograd's graph for a tensor that is on the host, or on its way."""

    __slots__ = ("_begin", "_layout", "_offload", "_span", "_stash", "_thread", "_witness")

    def __init__(
        self, tensor: torch.Tensor, span: Span, stash: Stash, offload: Offload, thread: int
    ) -> None:
        self._begin = int(tensor.storage_offset()) * tensor.itemsize
        self._layout = Layout(tensor.dtype, tensor.size(), tensor.stride())
        self._witness = Witness(tensor)
        self._offload = offload
        self._span = span
        self._stash = stash
        self._thread = thread

    def unpack(self, way: Way) -> torch.Tensor:
        self._witness.check()
        with torch.no_grad():
            if not self._stash.is_open:
                if torch._C._current_graph_task_id() != -1:
                    way.begin(self._thread)
                self._offload.bring(self._stash)
            return self._span.view(self._begin, self._layout)


class Offload:
    """The stashes of one streamed model.

    Attributes:
        memory: what they take on the host.
        moved_bytes: how much has left, all calls together.
    """

    def __init__(self, streams: Streams) -> None:
        self.memory = HostMemory(streams)
        self.moved_bytes = 0
        self._streams = streams
        self._least_bytes = LEAST_BYTES[streams.device.type]
        self._spans: weakref.WeakValueDictionary[int, Span] = weakref.WeakValueDictionary()
        self._stashes: list[weakref.ref[Stash]] = []  # in the order of their calls' ends
        self._leaving: list[Stash] = []
        self._here: list[Stash] = []  # the one that is read, then the one that is expected

    # ---- in the forward -------------------------------------------------------------------------

    @contextmanager
    def stashing(
        self, name: str, is_weight: Callable[[torch.Tensor], bool], thread: int
    ) -> Iterator[Callable[[torch.Tensor], Packed]]:
        """For the length of a block's call; gives what keeps a tensor that autograd saves."""
        stash = Stash(name)

        def keep(tensor: torch.Tensor) -> Packed:
            if not self._is_worth_it(tensor) or is_weight(tensor):
                return Kept(tensor)
            return Away(tensor, self._span(tensor, stash), stash, self, thread)

        yield keep  # when the call fails, nothing leaves
        with torch.no_grad(), label("offload", name):
            self._leave(stash)

    def _is_worth_it(self, tensor: torch.Tensor) -> bool:
        return (
            type(tensor) is torch.Tensor
            and tensor.device == self._streams.device
            and tensor.layout is torch.strided
            and tensor.nbytes >= self._least_bytes
            and not (tensor.is_leaf and tensor.requires_grad)
            and not (tensor.is_conj() or tensor.is_neg())
            and tensor.data_ptr() % tensor.itemsize == 0
        )

    def _span(self, tensor: torch.Tensor, stash: Stash) -> Span:
        """The span that `tensor` lies in: a known one, if that has the same values, or a new one.

        Until it leaves, a span grows; afterwards it is as it is.
        """
        storage = tensor.untyped_storage()
        begin = int(tensor.storage_offset()) * tensor.itemsize
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        end = begin + (reach + 1) * tensor.itemsize
        span = self._spans.get(storage._cdata)
        if span is None or not span.can_hold(begin, end, tensor._version):
            span = self._spans[storage._cdata] = Span(storage, begin, end)
        span.version = tensor._version
        stash.add(span)
        return span

    def _leave(self, stash: Stash) -> None:
        stash.is_open = False
        spans = stash.spans()
        if not spans:
            return
        self._stashes = [known for known in self._stashes if known() is not None]
        self._stashes.append(weakref.ref(stash))
        earlier, self._leaving = self._leaving, []
        stash.held = [span for span in spans if span.host is None]
        if stash.held:
            leaving = give_host_places(stash.held, self.memory)
            # Protects the copy from values that are still being computed, and from copies that
            # still read the host's memory.
            self._streams.wait(OFFLOAD, self._streams.record(COMPUTE))
            self._streams.copy_out(leaving)
            stash.copied = self._streams.record(OFFLOAD)
            stash.stream = self._streams.compute_stream()
            self.moved_bytes += sum(span.num_bytes for span in stash.held)
        for other in earlier:
            self._let_go(other)
        self._leaving.append(stash)

    def _let_go(self, stash: Stash) -> None:
        """Gives up the memory that the stash was computed in."""
        if stash.held and stash.stream != self._streams.compute_stream():
            self._leaving.append(stash)  # the allocator gives it to its own stream, which must wait
            return
        if stash.held:
            # Protects the memory from whoever gets it next, while the copy still reads it.
            self._streams.wait(COMPUTE, stash.copied)
        for span in stash.held:
            span.storage = None
        stash.held = []

    # ---- in the backward ------------------------------------------------------------------------

    def bring(self, stash: Stash) -> None:
        """The stash is on the device when this returns (COMPUTE waits, not the host)."""
        if self._here and self._here[0] is stash:
            return
        others = [other for other in self._here if other is not stash]
        if not stash.is_here:
            self._fetch(stash)
        self._wait_for_fetch(stash)
        for other in others:
            self._give_up(other)
        self._here = [stash]
        expected = self._before(stash)
        if expected is not None:
            self._fetch(expected)
            self._here.append(expected)

    def _before(self, stash: Stash) -> Stash | None:
        """The stash that a backward most likely wants next."""
        found = None
        for reference in self._stashes:
            other = reference()
            if other is stash:
                return found
            if other is not None and other.spans():
                found = other
        return None

    def _fetch(self, stash: Stash) -> None:
        stash.is_here = True
        spans = stash.spans()
        for span in spans:
            span.num_here += 1
        missing = [span for span in spans if span.storage is None and span.device is None]
        own = [span for span in missing if span.num_stashes == 1]
        groups = [own, *([span] for span in missing if span.num_stashes > 1)]
        runs = [
            run for group in groups if group for run in give_device_places(group, self._streams)
        ]
        if not runs:
            return
        stash.memory = [run.destination for run in runs]
        with label("bring", stash.name):
            # Protects what the new memory was before from being overwritten while it is read.
            self._streams.wait(FETCH, self._streams.record(COMPUTE))
            self._streams.copy(runs)
        stash.filled = self._streams.record(FETCH)

    def _wait_for_fetch(self, stash: Stash) -> None:
        if stash.filled is not None:
            # Protects what reads the stash, and whoever gets its memory next, from the copy.
            self._streams.wait(COMPUTE, stash.filled)
            stash.filled = None

    def _give_up(self, stash: Stash) -> None:
        self._wait_for_fetch(stash)
        stash.is_here = False
        stash.memory = []
        for span in stash.spans():
            span.num_here -= 1
            if not span.num_here:
                span.device = None
        if stash in self._leaving:
            self._leaving.remove(stash)
            self._let_go(stash)

    def end_backward(self) -> None:
        """Nothing of a stash stays on the device, also after a failure."""
        here, self._here = self._here, []
        for stash in here:
            self._give_up(stash)
        leaving, self._leaving = self._leaving, []
        for stash in leaving:
            self._let_go(stash)

    def close(self) -> None:
        """Gives up the host's memory that nothing in a graph stands for."""
        self.end_backward()
        self._streams.synchronize()
        self.memory.close()
