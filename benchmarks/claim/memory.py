"""How much device memory does a model take, streamed and plain, and at what speed?

Peak device memory is everything at once: weights, activations, caches, workspaces. Over bounds in
bytes (`weights=`) and over the method's (k, k'), beside the plain model in the same process, whose
bits every row is compared with.

    python -m benchmarks.claim.memory --model llm
    python -m benchmarks.claim.memory --model llm --cap-gib 12   # weights that really do not fit
    python -m benchmarks.claim.memory --model vit --size tiny --device cpu --seconds 1
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import superpipeline
from benchmarks.claim.models import CASES, MODELS, Case
from benchmarks.peers import gauge
from benchmarks.peers.floor import floor_ms
from benchmarks.peers.measure import How, is_equal, measure
from benchmarks.peers.workloads import SIZES, build, bytes_to_visit, to_host, weight_bytes
from benchmarks.record import RESULTS, save, table

Row = dict[str, Any]
# cuBLAS reads this when it starts; without it the plain model may differ from itself.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Setting(NamedTuple):
    """A bound, or k and k'; neither for the plain model."""

    label: str
    options: dict[str, Any]


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    for bound in filter(None, args.bounds.split(",")):
        yield Setting(bound, {"weights": bound})
    for pair in filter(None, args.pairs.split(",")):
        k, k_prime = map(int, pair.split(":"))
        yield Setting(f"k={k}, k'={k_prime}", {"k": k, "k_prime": k_prime})


def rows_of(
    model: nn.Module, setting: Setting, plain: dict[str, Row], args: argparse.Namespace
) -> Iterator[Row]:
    """One row for each workload; what fails is a row with its error."""
    warm_ups = 1 if setting.options else 4  # the plain run comes first: the clocks settle
    # Twice, so that a plain model which differs from itself shows.
    repeats = args.repeats if setting.options else max(2, args.repeats)
    how = How(gauge.device_named(args.device), args.size, repeats, args.seconds, warm_ups)
    common: Row = {"model": args.model, "size": args.size, "setting": setting.label}
    common |= {"weights": weight_bytes(model)}
    if setting.options:
        begin = time.perf_counter()
        superpipeline.stream(model, device=args.device, quiet=True, **setting.options)
        common |= streamed_figures(model) | {"setup s": time.perf_counter() - begin}
    for name in args.workloads.split(";") if args.workloads else CASES[args.model]:
        if time.time() > args.deadline:
            return
        try:
            figures = measure(model, CASES[args.model][name].workload, how)
        except torch.OutOfMemoryError as error:
            yield {**common, "workload": name, "error": str(error)[:200]}
            continue
        row = {**common, "workload": name, **figures}
        yield row | beside(row, plain.get(name), CASES[args.model][name], args)


def streamed_figures(model: nn.Module) -> Row:
    pipe = superpipeline.handle(model)
    return {
        "device weight bytes": pipe.plan.device_bytes, "link GB/s": pipe.link_rate / 1e9,
        "streamed bytes": pipe.plan.streamed_bytes, "host bytes": pipe.host_bytes,
    }  # fmt: skip


def beside(row: Row, plain: Row | None, case: Case, args: argparse.Namespace) -> Row:
    """The speed in the workload's unit, and the row as shares of the plain one."""
    amount = case.amount if args.size == "full" else 1
    speed = {"unit": case.unit, "a second": amount / row["ms"] * 1e3}
    if plain is None:
        return speed | {"equal": row["runs agree"]}
    floor = floor_ms(plain["ms"], args.to_visit, row["device weight bytes"], row["link GB/s"] * 1e9)
    saved = None
    if row["peak allocated"]:
        saved = 1 - row["peak allocated"] / plain["peak allocated"]
    return speed | {
        # Where the plain model differs from itself, nothing can be said.
        "equal": is_equal(row, plain) if plain["equal"] else None,
        "plain ms": plain["ms"], "time / plain": row["ms"] / plain["ms"], "saved": saved,
        "floor ms": floor, "ratio": row["ms"] / floor,
    }  # fmt: skip


def run(args: argparse.Namespace) -> list[Row]:
    device = gauge.device_named(args.device)
    if args.deterministic:
        gauge.make_deterministic()
    model = build(MODELS[args.model], device, args.size)
    args.to_visit = bytes_to_visit(model)
    name = f"claim-{args.model}" + ("-capped" if args.cap_gib else "")
    name += "-deterministic" if args.deterministic else ""
    name += "" if args.size == "full" else f"-{args.size}"
    rows = list(rows_of(model, Setting("plain", {}), {}, args))
    plain = {row["workload"]: row for row in rows if "ms" in row}
    if args.cap_gib:
        rows.append(plain_under_cap(model, args))
    for setting in settings(args):
        if time.time() > args.deadline:
            break
        print(f"{time.strftime('%H:%M:%S')} {setting.label}", file=sys.stderr, flush=True)
        try:
            rows += rows_of(model, setting, plain, args)
        except superpipeline.SuperpipelineError as error:
            rows.append({"model": args.model, "setting": setting.label, "error": str(error)[:400]})
        save(name, rows, args.out)
    return rows


def plain_under_cap(model: nn.Module, args: argparse.Namespace) -> Row:
    """Caps the device's memory from now on; whether the plain model's weights still fit."""
    device = gauge.device_named(args.device)
    to_host(model)
    gauge.begin_peaks(device)
    gauge.cap(device, int(args.cap_gib * gauge.GIB))
    row: Row = {"model": args.model, "setting": "plain", "cap GiB": args.cap_gib}
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        row["error"] = str(error)[:200]
    to_host(model)
    gauge.begin_peaks(device)
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), required=True)
    parser.add_argument("--workloads", default="", help="some of the model's, semicolons between")
    parser.add_argument("--bounds", default="15%,25%,40%,60%,80%,100%")
    parser.add_argument("--pairs", default="2:1,4:1,4:2,8:4", help="k:k', comma-separated")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cap-gib", type=float, default=0, help="device memory, once plain ran")
    parser.add_argument("--deterministic", action="store_true", help="without cuDNN's attention")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5, help="for one row, about")
    parser.add_argument("--time-limit", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.deadline = time.time() + args.time_limit
    return args


def main() -> None:
    rows = run(parse())
    shown = ("workload", "setting", "peak allocated", "saved", "ms", "a second", "equal", "error")
    print(table([{name: row.get(name, "-") for name in shown} for row in rows]))


if __name__ == "__main__":
    main()
