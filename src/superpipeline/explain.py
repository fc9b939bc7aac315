"""Words for a plan: the line at the start, and `explain()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from superpipeline.notices import warn
from superpipeline.plan import Plan
from superpipeline.simulate import steps
from superpipeline.sizes import format_bytes

if TYPE_CHECKING:
    from superpipeline.pipeline import Pipeline

_GIB = 2**30


def headline(pipe: Pipeline) -> str:
    """One line: what goes where, and what it costs.

    `15.0 GiB for cuda:0 in 6.0: 4.6 resident, 1.4 window, 10.4 streamed each pass (204 ms at …)`
    """
    plan, device = pipe.plan, pipe.options.device
    unit, name = _unit(plan.weight_bytes)
    total, used, resident, window, streamed, host = (
        f"{count / unit:.1f}"
        for count in (
            plan.weight_bytes,
            plan.bound_bytes if plan.bound_bytes is not None else plan.device_bytes,
            plan.resident_bytes, plan.window_bytes, plan.streamed_bytes, pipe.host_bytes,
        )
    )  # fmt: skip
    kind = "" if device.type == "cpu" else " pinned" if pipe.pinned else " not pinned"
    disk = f", disk {pipe.disk_bytes / unit:.1f} {name}" if pipe.disk_bytes else ""
    return (
        f"{total} {name} for {device} in {used}: {resident} resident, {window} window, "
        f"{streamed} streamed each pass ({_cost(pipe)}); host {host} {name}{kind}{disk}"
    )


def explain(pipe: Pipeline) -> str:
    """Several lines: residency, window, order, costs, and when the copies hide."""
    plan, stats = pipe.plan, pipe.stats()
    resident, window = format_bytes(plan.resident_bytes), format_bytes(plan.window_bytes)
    work, streamed = plan.workload, format_bytes(stats.streamed_bytes)
    lines = [
        headline(pipe),
        f"  resident  {resident}: {len(plan.resident)} of {len(work.weights)} weights",
        f"  window    {window} for {len(plan.places)} of {len(work.blocks)} blocks",
        f"            {_overlap(plan)}",
        f"  link      {pipe.link_rate / 1e9:.1f} GB/s measured; {_cost(pipe)} each pass",
        *_from_disk(pipe),
        *_training(pipe),
        f"  so far    {stats.passes} passes, {stats.fetches} fetches, {streamed} streamed",
        f"            {stats.late_fetches} fetches not foreseen",
        f"  hides     {_break_even(pipe)}",
        f"  order     {_shortened(plan.schedule())}",
    ]
    return "\n".join(lines + [f"    {line}" for line in _blocks(plan)])


def checked_overlap(pipe: Pipeline, plan: Plan) -> Plan:
    """Warns, when a plan is taken up, if its copies cannot overlap compute."""
    if plan.places and not plan.is_at_rest and _is_serial(plan) and not pipe.options.quiet:
        from superpipeline.planner import least_overlapping_bytes

        least = least_overlapping_bytes(plan.workload)
        warn(
            f"this plan holds one block at a time, so no copy overlaps compute; they do from "
            f"weights={least} ({format_bytes(least)}) on, or with k=2"
        )
    return plan


def _is_serial(plan: Plan) -> bool:
    circle = plan.circle
    return (
        len(circle) > 1
        and not plan.workload.in_place
        and all(len(plan.overlaps[block]) == len(plan.places) for block in circle)
    )


def _overlap(plan: Plan) -> str:
    if plan.is_at_rest:
        return "everything fits side by side: nothing is fetched twice"
    if plan.workload.in_place:
        return "pages of files: a fetch copies nothing that compute could overlap"
    if _is_serial(plan):
        return "one block at a time: no copy overlaps compute"
    if plan.collisions:
        return f"copies overlap compute except at {len(plan.collisions)} of the changes"
    return "copies overlap compute"


def _cost(pipe: Pipeline) -> str:
    rate = pipe.link_rate
    if pipe.disk_bytes:
        return f"{format_bytes(_read_each_pass(pipe))} of it from disk"
    return f"{pipe.plan.streamed_bytes / rate * 1e3:.0f} ms at {rate / 1e9:.1f} GB/s"


def _read_each_pass(pipe: Pipeline) -> int:
    """Bytes read from disk in a steady pass."""
    assert pipe.engine is not None
    fetched = [step.block for step in steps(pipe.plan) if step.action == "F"]
    return sum(pipe.engine.blocks[block].disk_bytes for block in fetched)


def _from_disk(pipe: Pipeline) -> list[str]:
    """What of a steady pass is read from disk."""
    if not pipe.disk_bytes:
        return []
    read = _read_each_pass(pipe)
    return [
        f"  disk      keeps {format_bytes(pipe.disk_bytes)}; {format_bytes(read)} read each pass",
        f"            so it takes at least {read / 1e9:.2f} s from a disk that gives 1 GB/s",
    ]


def _break_even(pipe: Pipeline) -> str:
    """2 FLOPs for each parameter and token against 2 bytes for each streamed one."""
    plan = pipe.plan
    if not plan.streamed_bytes:
        return "nothing to hide: nothing is fetched in a steady pass"
    if plan.workload.in_place:
        return "nothing to hide: nothing is copied"
    share = plan.streamed_bytes / max(plan.weight_bytes, 1)
    per_tflops = share * 1e12 / pipe.link_rate
    return (
        f"for 2-byte weights, behind passes of about {per_tflops:.0f} tokens for each TFLOP/s that "
        f"the device reaches; below that the link sets the pace (single-request decode always)"
    )


def _blocks(plan: Plan) -> list[str]:
    rows = []
    for index, block in enumerate(plan.workload.blocks):
        total = sum(plan.workload.weights[weight].num_bytes for weight in block.weights)
        streamed = plan.places[index].num_bytes if index in plan.places else 0
        rows.append(
            f"{index:4d}  {block.name}: {format_bytes(total)}, {format_bytes(streamed)} streamed, "
            f"{plan.workload.visits.get(index, 0)} visits"
        )
    return rows if len(rows) <= 40 else [*rows[:20], f"      … {len(rows) - 40} more", *rows[-20:]]


def _shortened(text: str, width: int = 400) -> str:
    return text if len(text) <= width else f"{text[:width]} …"


def _unit(num_bytes: int) -> tuple[int, str]:
    return (
        (_GIB, "GiB")
        if num_bytes >= _GIB
        else (2**20, "MiB")
        if num_bytes >= 2**20
        else (1024, "KiB")
    )


def _training(pipe: Pipeline) -> list[str]:
    """Where what trains does so; for what resides that costs device memory beside the bound."""
    if not pipe.stats().backward_streamed_bytes:
        return []
    trained = [
        weight
        for weight in pipe.assembly.layout.weights
        if any(alias.tensor.requires_grad for alias in weight.aliases)
    ]
    device, resident = pipe.options.device, pipe.plan.resident
    here = sum(w.num_bytes for w in trained if device.type != "cpu" and w.index in resident)
    total, beside = format_bytes(sum(w.num_bytes for w in trained)), format_bytes(3 * here)
    if not here:
        return [f"  trains    {total}, gradients and optimizer state in host memory"]
    more = f"where gradients and AdamW's state take {beside} beside the bound"
    return [f"  trains    {total}: {format_bytes(here)} of it on {device}, {more}"]


def note_memory(error: BaseException, plan: Plan, device: torch.device) -> None:
    """Tells whoever ran out of device memory what of it weights hold."""
    held = format_bytes(plan.device_bytes)
    half = format_bytes(plan.device_bytes // 2)
    error.add_note(
        f"superpipeline: weights hold {held} of {device}; the rest was activations and caches. "
        f"Give the weights less, for example superpipeline.stream(model, weights={half!r}), or use "
        f"a smaller batch"
    )
