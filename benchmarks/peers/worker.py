"""One process, one contender, one model: sets it up for each budget, measures, writes each row.

Started by `python -m benchmarks.peers`. Rows are written as soon as they exist, so that a process
that is killed keeps what it has.
"""

import argparse
import importlib
import importlib.metadata
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.peers import gauge
from benchmarks.peers.contenders import CONTENDERS, Contender, Job, Ready
from benchmarks.peers.floor import floor_ms
from benchmarks.peers.measure import How, is_equal, measure
from benchmarks.peers.workloads import (
    MODELS,
    WORKLOADS,
    build,
    bytes_to_visit,
    to_host,
    weight_bytes,
)

Row = dict[str, Any]


class Budget(NamedTuple):
    """How much device memory for weights: a share of all of them, or bytes."""

    label: str
    share: float | None = None
    num_bytes: int | None = None

    def of(self, total: int) -> int:
        return int(self.share * total) if self.share is not None else self.num_bytes or 0


class Run:
    """The state of one worker: the model and how it stands, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = gauge.device_named(args.device)
        self.contender: Contender = CONTENDERS[args.contender]
        self.plain: dict[str, Row] = json.loads(args.plain)
        self.rows: list[Row] = []
        self.ready: Ready | None = None
        self.link_rate = gauge.link_rate(self.device)
        if args.link and self.device.type == "cuda" and self.link_rate > args.link * 1.05e9:
            sys.exit(f"the link is not paced: {self.link_rate / 1e9:.1f} GB/s, not {args.link}")
        self.sizes: dict[str, int] = {}
        self.host_before = self.system_before = 0

    def all(self) -> None:
        for text in json.loads(self.args.budgets):
            budget = Budget(**text)
            if time.time() > self.args.deadline:
                return self.note("no time left")
            setting = self.set_up(budget)
            for name in self.args.workloads.split(","):
                if "error" in setting:
                    self.add({**setting, "workload": name})
                elif time.time() < self.args.deadline:
                    self.add({**setting, **self.measured(name, setting)})
        return None

    def set_up(self, budget: Budget) -> Row:
        """Sets the contender up for `budget`; the beginning of its rows."""
        row: Row = {
            "contender": self.args.contender, "version": _version(self.contender.package),
            "budget": budget.label, "round": self.args.round, "size": self.args.size,
            "paced GB/s": self.args.link or None, "link GB/s": self.link_rate / 1e9,
        }  # fmt: skip
        try:
            again = self.ready.again if self.ready else None
            model = self.ready.model if self.ready and again else self.fresh_model()
            self.ready = None if again is None else self.ready
            row["budget bytes"] = budget.of(self.sizes["total"])
            if self.contender.module:
                importlib.import_module(self.contender.module)
            activations = max((p["activation bytes"] or 0 for p in self.plain.values()), default=0)
            job = Job(model, self.args.model, self.device, row["budget bytes"], activations)
            self.note(f"sets up for {budget.label}")
            begin = time.perf_counter()
            self.ready = again(job) if again else self.contender.set_up(job)
            gauge.settle(self.device)
            row["setup s"] = time.perf_counter() - begin
            row["setup"] = "again" if again else "first"
            row["settings"], row["weight bytes"] = self.ready.settings, self.ready.weight_bytes
        except Exception as error:  # noqa: BLE001  (a contender that fails is a row)
            row["error"] = _told(error)
        return row

    def fresh_model(self) -> nn.Module:
        """The model in host memory, and what host and device held before a contender came."""
        self.ready = None
        gauge.begin_peaks(self.device)
        model = to_host(build(MODELS[self.args.model], self.device, self.args.size))
        self.sizes = {"total": weight_bytes(model), "to visit": bytes_to_visit(model)}
        gauge.begin_peaks(self.device)
        self.host_before, self.system_before = gauge.begin_host_peak(), gauge.system_used()
        return model

    def measured(self, name: str, setting: Row) -> Row:
        assert self.ready is not None
        self.note(f"runs {name} at {setting['budget']}")
        row: Row = {"workload": name}
        try:
            how = How(
                self.device, self.args.size, self.args.repeats, self.args.seconds,
                self.contender.warm_ups,
            )  # fmt: skip
            row |= measure(self.ready.model, WORKLOADS[name], how)
        except Exception as error:  # noqa: BLE001
            return row | {"error": _told(error)}
        row |= {
            "weights": self.sizes["total"],
            "host bytes": gauge.host_peak() - self.host_before + self.sizes["total"],
            "system bytes": gauge.system_used() - self.system_before + self.sizes["total"],
        }
        return row | self.compared(name, row, setting)

    def compared(self, name: str, row: Row, setting: Row) -> Row:
        """The row beside the plain run: equality, memory without activations, the floor."""
        if self.args.contender == "resident":
            held = self.sizes["total"]
            rest = None if row["peak allocated"] is None else row["peak allocated"] - held
            return {"activation bytes": rest, "plain ms": row["ms"], "equal": True}
        plain = self.plain.get(name)
        if plain is None:
            return {}
        peak = row["peak allocated"]
        held = None if peak is None else peak - plain["activation bytes"]
        given = self.args.contender == "superpipeline" or held is None
        bound = setting["budget bytes"] if given else held
        floor = floor_ms(plain["ms"], self.sizes["to visit"], bound, self.link_rate)
        return {
            "plain ms": plain["ms"], "measured weight bytes": held,
            "floor ms": floor, "ratio": row["ms"] / floor,
            "equal": is_equal(row, plain),
        }  # fmt: skip

    def add(self, row: Row) -> None:
        self.rows.append(row)
        Path(self.args.rows).write_text(json.dumps(self.rows, indent=1))

    def note(self, text: str) -> None:
        now = time.strftime("%H:%M:%S")
        print(
            f"{now} {self.args.contender}, {self.args.model}: {text}", file=sys.stderr, flush=True
        )


def _version(package: str) -> str:
    if not package:
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # Run from its sources, it says so itself.
        return getattr(importlib.import_module(package), "__version__", "not installed")


def _told(error: Exception) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"[:400]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("contender", "model", "workloads", "budgets", "plain", "rows", "device", "size"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("deadline", "seconds", "link"):
        parser.add_argument(f"--{name}", type=float, required=True)
    for name in ("repeats", "round"):
        parser.add_argument(f"--{name}", type=int, required=True)
    Run(parser.parse_args()).all()


if __name__ == "__main__":
    main()
