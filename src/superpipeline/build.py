"""From a model to what planner and engine work on: blocks of weights."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from superpipeline import blocks as cutting
from superpipeline.disk import locate
from superpipeline.pagemap import private_pages
from superpipeline.plan import BlockSpec, Plan, WeightSpec, Workload, neighbours, turns
from superpipeline.planner import group_neighbours, plan_for_bound, plan_for_k
from superpipeline.sizes import Size, parse_bytes
from superpipeline.states import Block
from superpipeline.weights import Locate, Weight, find_weights

if TYPE_CHECKING:
    from superpipeline.options import Options

# Below this a buffer resides: it is often written, and never worth a transfer of its own.
LEAST_STREAMED_BUFFER = 64 * 1024
# Transfers below this run at half the link's rate (H100, PCIe 5: 38 GB/s at 1 MiB, 53 at 4 MiB).
LEAST_TRANSFER = {"cuda": 4 * 2**20, "cpu": 256 * 1024}
# Above this a unit is cut, if that is asked for: transfers get no faster, but the window larger.
LARGEST_BLOCK = 128 * 2**20
# Below this a weight that trains does so on the device.
LEAST_TRAINED_ON_HOST = 2**20
# Below this a weight on disk is kept in host memory: a read of its own would cost more than it.
LEAST_READ = 16 * 1024
# Below this share of weights that are copied, it does not pay to overlap copies with compute.
MOST_COPIED = 0.05


class Layout:
    """What is known of a model: its blocks, their weights, and what passes have shown.

    Attributes:
        must_reside: weights that have to be resident.
        better_resident: weights read by code outside their block, written by a forward, or handed
            out as views; they reside if the bound allows.
        cast_outside: weights of which other code than their block reads autocast's copy.
        written: streamed weights that a forward writes.
        rows: weights looked up by rows, or read where they are on the host.
        most_block_bytes: units larger than this were cut; None: none.
        in_place: whether weights that lie in files as they are computed with need no copy.
        busy: for each block, the bytes that cross the link while it computes; empty: not known.
    """

    def __init__(self, weights: list[Weight], blocks: list[Block], cut: cutting.Cut) -> None:
        self.weights = weights
        self.blocks = blocks
        self.must_reside: set[int] = set()
        self.written: set[Weight] = set()
        self.cast_outside: set[int] = set()
        self.better_resident: set[int] = set()
        self.trained: set[int] = set()
        self._given_up: set[int] = set()
        self._rewritten: set[Weight] = set()
        self._adopted: list[tuple[Block, Weight]] = []
        self.rows: set[int] = set()
        self.most_block_bytes: int | None = None
        self.in_place = self._has_trained = False
        self.busy: tuple[float, ...] = ()
        self.embeddings: dict[int, bool] = {}  # rows weight -> its lookup may run on the host
        self._readers: dict[int, set[int | None]] = {}
        self._traces: list[tuple[int, ...]] = [tuple(range(len(blocks)))]
        self._assumed = True
        self._cut: cutting.Cut | None = cut

    def workload(self) -> Workload:
        """For the planner."""
        weights = tuple(
            WeightSpec(w.name, w.padded_bytes if w.num_bytes else 0) for w in self.weights
        )
        members = tuple(
            BlockSpec(block.name, tuple(weight.index for weight in block.weights))
            for block in self.blocks
        )
        return Workload(
            weights=weights, blocks=members,
            order=tuple(block for trace in self._traces for block in trace),
            must_reside=frozenset(self.must_reside | self.better_resident),
            rows=frozenset(self.rows), trained=frozenset(self.trained),
            in_place=self._is_in_place(), busy=self.busy,
        )  # fmt: skip

    def _is_in_place(self) -> bool:
        if not self.in_place:
            return False
        held = Counter(weight for block in self.blocks for weight in block.weights)
        stays = {weight for weight in held if held[weight] == 1 and self._stays_in_file(weight)}
        copied = sum(weight.num_bytes for weight in held if weight not in stays)
        return copied <= MOST_COPIED * sum(weight.num_bytes for weight in held)

    def _stays_in_file(self, weight: Weight) -> bool:
        """Whether the device reads the weight from its file, which an edit ends."""
        trains = self._has_trained and any(a.tensor.requires_grad for a in weight.aliases)
        is_kept_there = weight.index in self._kept_on_disk and weight.lies_as_computed
        return is_kept_there and weight not in self._edited and not trains

    @cached_property
    def _kept_on_disk(self) -> frozenset[int]:
        return self.stored()

    @cached_property
    def _edited(self) -> set[Weight]:
        """The weights that lie in a mapped file and were written there when this was laid out."""
        kept = (self.weights[index] for index in self._kept_on_disk)
        return {w for w in kept if private_pages(w.aliases[0].tensor.data_ptr(), w.num_bytes)}

    @staticmethod
    def plan_for_bound(work: Workload, bound: int) -> Plan:
        return plan_for_bound(work, bound)

    @staticmethod
    def plan_for_k(work: Workload, options: Options) -> Plan:
        assert options.k is not None
        return plan_for_k(work, options.k, options.k_prime)

    def note_reads(self, touched: dict[Weight, set[int | None]]) -> bool:
        """Gives each weight to the one block that read it, else makes it a stray. True if new."""
        changed = False
        for weight, readers in touched.items():
            known = self._readers.setdefault(weight.index, set())
            if readers <= known:
                continue
            known |= readers
            changed = True
            only = next(iter(known)) if len(known) == 1 else None
            if only is not None and weight not in self.blocks[only].weights:
                self.blocks[only].weights.append(weight)
                self._adopted.append((self.blocks[only], weight))
            else:
                self.note_better_resident([weight])
        return changed

    def note_order(self, trace: Sequence[int]) -> bool:
        """Remembers how a new kind of pass visits the blocks. True if that changes the plan."""
        circle = tuple(trace)
        if circle in self._traces or not circle:
            return False
        placed = range(len(self.blocks))
        known = {pair for t in self._traces for pair in neighbours(turns(t, placed))}
        if self._assumed:
            self._traces, self._assumed = [], False
        elif neighbours(turns(circle, placed)) <= known:
            return False
        self._traces.append(circle)
        return True

    def note_better_resident(self, weights: Iterable[Weight]) -> bool:
        """These should be resident; they stay right without. True if that is news."""
        # To move what has trained would leave its optimizer state behind, on the other device.
        known = self.better_resident | self._given_up | self.trained
        news = {weight.index for weight in weights} - known
        self.better_resident |= news
        return bool(news)

    def note_rewritten(self, weights: set[Weight]) -> bool:
        """These are written while it is not their turn: no copy made ahead may be used."""
        self._rewritten |= weights
        return self.note_better_resident(weights)

    def note_trained(self) -> bool:
        """A backward has shown that the model trains. True if that changes the plan.

        The optimizer steps large weights on the host, so they do not reside. Small ones (adapters,
        heads) had better: they are ordinary parameters of the device, with their optimizer state.
        """
        trainable = {
            w.index for w in self.weights if any(a.tensor.requires_grad for a in w.aliases)
        }
        large = {i for i in trainable if self.weights[i].num_bytes >= LEAST_TRAINED_ON_HOST}
        changed = large != self.trained
        self._given_up |= self.better_resident & large
        self.better_resident -= large
        self.trained = large
        small = (self.weights[i] for i in trainable - large if i not in self.rows)
        return self.note_better_resident(small) or changed

    def note_edits(self) -> bool:
        """The same where the host computes: what trains is edited, and no longer in its file."""
        if self._has_trained:
            return False
        before, self._has_trained = self._is_in_place(), True
        return before != self._is_in_place()

    def note_times(self, times: Mapping[int, float], link_rate: float) -> None:
        """Remembers how many seconds each block computes, and what the link carries meanwhile."""
        self.busy = tuple(times.get(index, 0.0) * link_rate for index in range(len(self.blocks)))

    @property
    def noted(self) -> set[int]:
        """Weights that `note_better_resident` was told of, granted or not."""
        return self.better_resident | self._given_up

    def give_up_wishes(self, unreadable: AbstractSet[int]) -> bool:
        """The bound is too small for what `note_reads` and `note_better_resident` asked for.

        Such weights stream with their own block, or are read on the host; those `unreadable` there
        must reside all the same. False if there are none.
        """
        if not self.better_resident and not self._adopted:
            return False
        for block, weight in self._adopted:
            block.weights.remove(weight)
            self.better_resident.add(weight.index)
        for block in self.blocks:
            block.weights[:] = [weight for weight in block.weights if weight not in self._rewritten]
        self._adopted.clear()
        inside = {weight.index for block in self.blocks for weight in block.weights}
        self.rows |= self.better_resident - inside - unreadable
        self.must_reside |= self.better_resident & unreadable
        self._given_up |= self.better_resident
        self.better_resident.clear()
        return True

    def drop_unreadable_rows(self, unreadable: AbstractSet[int]) -> bool:
        """Where the device cannot read a table by itself, one of unusual lookups must reside."""
        odd = {index for index in self.rows if not self.embeddings.get(index, False)} & unreadable
        self.rows -= odd
        self.must_reside |= odd
        return bool(odd)

    def stored(self) -> frozenset[int]:
        """The weights that may stay on disk."""
        return frozenset(
            weight.index
            for weight in self.weights
            if weight.stored is not None
            and not weight.is_buffer
            and weight.num_bytes >= LEAST_READ
            # A stand-in has no rows to look up.
            and (weight.stored.is_mapped or weight.index not in self.rows)
        )

    def callable_modules(self) -> list[tuple[nn.Module, Block | None]]:
        """Modules whose calls are to be seen, with their blocks."""
        assert self._cut is not None
        blocks = [(root, block) for block in self.blocks for root in block.live_roots()]
        return [*blocks, *((module, None) for module in self._cut.containers)]

    def tables(self) -> list[tuple[nn.Embedding, int]]:
        """The embedding modules that are looked up by rows, with their weights."""
        assert self._cut is not None
        index = {id(alias.tensor): w.index for w in self.weights for alias in w.aliases}
        return [(table, index[id(table.weight)]) for table in self._cut.rows]

    def forget_modules(self) -> None:
        """Keeps no module alive from here on."""
        self._cut = None


def lay_out(
    model: nn.Module, device: torch.device, k_prime: int, uncalled: Collection[nn.Module],
    where: Locate = locate, bound: Size | None = None,
) -> Layout:  # fmt: skip
    """Cuts `model` into blocks of weights. Changes nothing.

    Args:
        where: says where a tensor is on disk, if it is there.
        bound: of device bytes; large units are cut if it is less than all. None leaves them whole.
        k_prime: how many parts move together; 1 groups only parts too small for a transfer.
        uncalled: modules that are never called although they could be; they are cut further.
    """
    weights = find_weights(model, device, where)
    by_tensor = {id(alias.tensor): weight for weight in weights for alias in weight.aliases}
    most = most_block_bytes(bound, sum(weight.padded_bytes for weight in weights))
    cut = _without_empty_parts(cutting.cut(model, uncalled, most), by_tensor)
    tables = {id(table.weight): table for table in cut.rows}
    members = [_members(part, by_tensor) for part in cut.parts]
    blocks = [
        _block(index, [cut.parts[i] for i in group], [members[i] for i in group])
        for index, group in enumerate(_groups(cut, members, device, k_prime))
    ]
    layout = Layout(weights, blocks, cut)
    layout.most_block_bytes = most
    layout.rows = {by_tensor[table].index for table in tables}
    layout.embeddings = {
        by_tensor[key].index: type(table).forward is nn.Embedding.forward
        for key, table in tables.items()
    }
    layout.must_reside = _must_reside(layout, cut, by_tensor)
    return layout


def most_block_bytes(bound: Size | None, total_bytes: int) -> int | None:
    """How large a unit may be before it is cut; None where cutting would only cost visits."""
    is_whole = bound is None or parse_bytes(bound, total_bytes) >= total_bytes
    return None if is_whole else LARGEST_BLOCK


def _without_empty_parts(cut: cutting.Cut, by_tensor: dict[int, Weight]) -> cutting.Cut:
    """A part that has nothing to stream (a module of small buffers) needs no turns."""
    empty = [part for part in cut.parts if not _members(part, by_tensor)]
    cut.parts = [part for part in cut.parts if part not in empty]
    cut.containers += [root for part in empty for root in part.roots]
    return cut


def _members(part: cutting.Part, by_tensor: dict[int, Weight]) -> list[Weight]:
    found = dict.fromkeys(by_tensor[tensor] for tensor in part.tensors if tensor in by_tensor)
    return [
        weight
        for weight in found
        if weight.num_bytes and (not weight.is_buffer or _is_data(weight))
    ]


def _is_data(weight: Weight) -> bool:
    """Whether a buffer is quantized weights or a like table, which only is read.

    Caches and statistics are floats, and are written in ways that no version counter and no
    operation's schema shows (BatchNorm's running mean): they reside.
    """
    dtypes = {alias.dtype for alias in weight.aliases}
    is_packed = all(not dtype.is_floating_point or dtype.itemsize == 1 for dtype in dtypes)
    is_complex = any(dtype.is_complex for dtype in dtypes)
    return is_packed and not is_complex and weight.num_bytes >= LEAST_STREAMED_BUFFER


def _must_reside(layout: Layout, cut: cutting.Cut, by_tensor: dict[int, Weight]) -> set[int]:
    inside = {weight.index for block in layout.blocks for weight in block.weights}
    outside = {weight.index for weight in layout.weights} - inside - layout.rows
    return outside | {by_tensor[t].index for t in cut.strays if t in by_tensor}


def _groups(
    cut: cutting.Cut, members: list[list[Weight]], device: torch.device, k_prime: int
) -> list[list[int]]:
    sizes = [sum(weight.padded_bytes for weight in part) for part in members]
    alone = [part.alone for part in cut.parts]
    if k_prime == 1:
        least = LEAST_TRANSFER.get(device.type, LEAST_TRANSFER["cpu"])
        return group_neighbours(sizes, alone, least, max(sizes, default=0))
    groups: list[list[int]] = []
    for index, single in enumerate(alone):
        full = not groups or len(groups[-1]) == k_prime or alone[groups[-1][-1]]
        if full or single:
            groups.append([index])
        else:
            groups[-1].append(index)
    return groups


def _block(index: int, parts: list[cutting.Part], members: list[list[Weight]]) -> Block:
    names = [part.name for part in parts]
    name = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    weights = list(dict.fromkeys(weight for part in members for weight in part))
    roots = [weakref.ref(root) for part in parts for root in part.roots]
    return Block(index, name, weights, roots)
