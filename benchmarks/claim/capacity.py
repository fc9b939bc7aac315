"""What does freed memory buy? The largest batch and the longest context on a 24 GB card.

The allocator is capped to what such a card has left beside the CUDA context. Plain and streamed
search for the largest size that still runs, and report tokens a second there, so that a reader sees
whether a larger batch pays.

    python -m benchmarks.claim.capacity
    python -m benchmarks.claim.capacity --size tiny --device cpu --cap-gib 0.03 --bounds plain,40%
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

import superpipeline
from benchmarks.peers import gauge
from benchmarks.peers.workloads import SIZES, build, llama, tokens, weight_bytes
from benchmarks.record import RESULTS, save, table

Row = dict[str, Any]
_CLOSE = 1.04  # the search ends where what runs and what does not are this close
_NEW = 8


class Shape(NamedTuple):
    """How many sequences of how many tokens."""

    rows: int
    length: int


class Tried(NamedTuple):
    """One size that ran: times in milliseconds, the most device memory, the last logits' bits."""

    size: int
    prefill_ms: float
    step_ms: float
    peak_bytes: int
    digest: str


class Question(NamedTuple):
    """What is made as large as possible, in which steps, and the shape for a size."""

    step: int
    shape: Callable[[int], Shape]


def questions(size: str) -> dict[str, Question]:
    prompt, step = (512, 256) if size == "full" else (16, 32)
    return {
        "batch": Question(4, lambda rows: Shape(rows, prompt)),
        "context": Question(step, lambda length: Shape(1, length)),
    }


def attempt(
    model: nn.Module, device: torch.device, size: int, shape: Shape, *, times: int = 1
) -> Tried | None:
    """A prompt and a few new tokens, the last of `times` measured; None where memory is short."""
    gauge.begin_peaks(device)
    try:
        for _ in range(times - 1):
            _generate(model, device, shape)
        prefill_ms, steps, logits = _generate(model, device, shape)
    except torch.OutOfMemoryError:
        return None
    peak = gauge.peaks(device).allocated or _rehearsed_peak(model, shape)
    return Tried(size, prefill_ms, median(steps), peak, gauge.digest(logits))


@torch.no_grad()
def _generate(
    model: nn.Module, device: torch.device, shape: Shape
) -> tuple[float, list[float], torch.Tensor]:
    if device.type == "cpu" and _rehearsed_peak(model, shape) > _rehearsed_cap:
        raise torch.OutOfMemoryError("more than the rehearsal's cap")
    ids = tokens(device, *shape)
    marks = [gauge.mark(device)]
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    marks.append(gauge.mark(device))
    for _ in range(_NEW):
        token = out.logits[:, -1:].argmax(-1)
        out = model(
            input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
        )
        marks.append(gauge.mark(device))
    gauge.settle(device)
    first, *rest = gauge.between_ms(marks)
    return first, rest, out.logits


# On a CPU nothing caps memory: the search is rehearsed on a peak that grows with the tokens.
_rehearsed_cap = 0


def _rehearsed_peak(model: nn.Module, shape: Shape) -> int:
    weights = weight_bytes(model)
    if _is_streamed(model):
        weights = superpipeline.handle(model).plan.device_bytes
    return weights + shape.rows * shape.length * 8192


def _is_streamed(model: nn.Module) -> bool:
    try:
        superpipeline.handle(model)
    except superpipeline.InputError:
        return False
    return True


def largest(
    run: Callable[[int], Tried | None], cap_bytes: int, step: int, deadline: float
) -> list[Tried | int]:
    """All attempts, sizes that failed as numbers: two small ones, then what their memory foretells,
    then between what ran and what did not."""
    small, double = run(step), run(2 * step)
    if small is None or double is None:
        return [small or step, double or 2 * step]
    tried: list[Tried | int] = [small, double]
    each = max(1, (double.peak_bytes - small.peak_bytes) // step)
    works, fails = double.size, 0
    guess = double.size + int((cap_bytes - double.peak_bytes) / each)
    while time.time() < deadline:
        guess = max(works + 1, guess // step * step or 1)
        found = run(guess)
        tried.append(found or guess)
        works, fails = (guess, fails) if found else (works, guess)
        if fails and (fails <= works * _CLOSE or fails <= works + step):
            break
        guess = (works + fails) // 2 if fails else int(works * _CLOSE) + step
    return tried


def row_of(
    model: nn.Module, what: str, setting: str, plain: Row | None, args: argparse.Namespace
) -> Row:
    """The largest size under one bound (or of the plain model), and what it gives there.

    It is compared with the plain model at the largest size that both can run.
    """
    print(f"{time.strftime('%H:%M:%S')} {what}, {setting}", file=sys.stderr, flush=True)
    device, question = gauge.device_named(args.device), questions(args.size)[what]

    def run(size: int, times: int = 1) -> Tried | None:
        return attempt(model, device, size, question.shape(size), times=times)

    tried = largest(run, args.cap_bytes, question.step, args.deadline)
    worked = {one.size: one for one in tried if isinstance(one, Tried)}
    row: Row = {"what": what, "setting": setting, "attempts": [*tried], "cap bytes": args.cap_bytes}
    if not worked:
        return row | {"error": "not even the smallest size fits"}
    again = run(max(worked), 2)  # finds its memory ready
    best = again or worked[max(worked)]
    row |= _figures(best, question)
    if plain is None or "digest" not in plain:
        agrees = again is not None and again.digest == worked[best.size].digest
        return row | {"digest": best.digest, "equal": agrees}
    same = run(min(plain["largest"], best.size))
    is_equal = same is not None and same.digest == plain["digest"]
    # Where the plain model differs from itself, nothing can be said.
    return row | {"equal": is_equal if plain["equal"] else None}


def _figures(best: Tried, question: Question) -> Row:
    rows, length = question.shape(best.size)
    return {
        "largest": best.size, "peak allocated": best.peak_bytes, "prompt": length,
        "prefill tokens a second": rows * length / best.prefill_ms * 1e3,
        "decode tokens a second": rows / best.step_ms * 1e3,
        "prefill ms": best.prefill_ms, "step ms": best.step_ms,
    }  # fmt: skip


def run(args: argparse.Namespace) -> list[Row]:
    global _rehearsed_cap  # noqa: PLW0603  (stands for the device's memory)
    device = gauge.device_named(args.device)
    if args.deterministic:
        gauge.make_deterministic()
    args.cap_bytes = _rehearsed_cap = int(args.cap_gib * gauge.GIB)
    gauge.cap(device, args.cap_bytes)
    model = build(llama, device, args.size)
    rows: list[Row] = []
    for bound in args.bounds.split(","):
        if time.time() > args.deadline:
            break
        setup: Row = {}
        if bound != "plain":
            superpipeline.stream(model, weights=bound, device=device, quiet=True)
            setup = {"device weight bytes": superpipeline.handle(model).plan.device_bytes}
        for what in args.what.split(","):
            plain = next((r for r in rows if (r["what"], r["setting"]) == (what, "plain")), None)
            rows.append(row_of(model, what, bound, plain, args) | setup)
            save(
                "claim-capacity" + ("" if args.size == "full" else f"-{args.size}"), rows, args.out
            )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bounds", default="plain,25%", help="plain first: it is on the device")
    parser.add_argument("--what", default="batch,context")
    parser.add_argument("--cap-gib", type=float, default=23.5, help="24 GiB less the CUDA context")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deterministic", action="store_true", help="without cuDNN's attention")
    parser.add_argument("--time-limit", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.deadline = time.time() + args.time_limit
    return args


def main() -> None:
    rows = run(parse())
    shown = (
        "what", "setting", "largest", "prefill tokens a second", "decode tokens a second",
        "peak allocated", "equal",
    )  # fmt: skip
    print(table([{name: row.get(name, "-") for name in shown} for row in rows]))


if __name__ == "__main__":
    main()
