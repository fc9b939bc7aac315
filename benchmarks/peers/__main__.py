"""Superpipeline beside its peers: time, memory and bits, each contender in a process of its own.

    python -m benchmarks.peers                                    # the first table, on a GPU
    python -m benchmarks.peers --only cache-dit,superpipeline --workloads flux --budgets 50%
    python -m benchmarks.peers --link 25                          # a paced link, see paced.py
    python -m benchmarks.peers --size tiny --device cpu --seconds 1   # a rehearsal

Rows are added to results/peers.json after each process (a row measured again takes the old one's
place), so a run can be cut off, or made in parts. The plain model comes first; what it gave is what
every other row is compared with. Superpipeline also runs with each peer's measured memory as its
bound, so that the two can be compared at the same memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.contenders import CONTENDERS, FIRST_TABLE
from benchmarks.peers.paced import pacing_environment
from benchmarks.peers.workloads import SIZES, WORKLOADS
from benchmarks.record import RESULTS, save, table

Row = dict[str, Any]
_KEY = ("contender", "workload", "budget", "size", "paced GB/s", "round")
_LEAST = {"label": "its own", "share": 1.0}


class Task(NamedTuple):
    """What one process does."""

    contender: str
    model: str
    workloads: tuple[str, ...]
    budgets: tuple[dict[str, Any], ...]
    round: int


class Table:
    """All rows so far, on disk after each change."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[Row] = []
        for path in (args.out / f"{args.name}.json", RESULTS / f"{args.name}.json"):
            if path.exists():
                self.rows = json.loads(path.read_text())["figures"]
                break

    def add(self, rows: list[Row]) -> None:
        fresh = {tuple(row.get(key) for key in _KEY) for row in rows}
        kept = [row for row in self.rows if tuple(row.get(k) for k in _KEY) not in fresh]
        self.rows = kept + rows
        save(self.args.name, self.rows, self.args.out)

    def of_this_kind(self, **wanted: Any) -> list[Row]:
        """Rows of this size and link that have these values."""
        wanted |= {"size": self.args.size, "paced GB/s": self.args.link or None}
        return [row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())]

    def plain(self, workloads: tuple[str, ...]) -> dict[str, Row]:
        """The latest plain rows that measured something."""
        found = self.of_this_kind(contender="resident")
        return {
            row["workload"]: row for row in found if "ms" in row and row["workload"] in workloads
        }


def tasks(args: argparse.Namespace, rows: Table) -> Iterator[Task]:
    """In the order in which they run; what comes later may depend on the rows of earlier ones."""
    workloads, only = args.workloads.split(","), args.only.split(",")
    budgets = tuple(
        {"label": b, "share": float(b.rstrip("%")) / 100} for b in args.budgets.split(",")
    )
    models = list(dict.fromkeys(WORKLOADS[name].model for name in workloads))
    for turn in range(args.rounds):
        for model in models:
            own = tuple(name for name in workloads if WORKLOADS[name].model == model)
            if turn == 0 and len(rows.plain(own)) < len(own):
                yield Task("resident", model, own, (_LEAST,), turn)
            for name in () if args.pairs_only else only:
                if name != "resident":
                    yield from _tasks_of(name, model, own, budgets, turn)
            peers = [n for n in only if n not in ("resident", "superpipeline")]
            wanted = "superpipeline" in only and not args.no_pairs
            if wanted and (pairs := at_peers_memory(rows, own, peers, turn)):
                yield Task("superpipeline", model, own, pairs, turn)


def _tasks_of(
    name: str,
    model: str,
    workloads: tuple[str, ...],
    budgets: tuple[dict[str, Any], ...],
    turn: int,
) -> Iterator[Task]:
    contender = CONTENDERS[name]
    budgets = budgets if contender.has_budget else (_LEAST,)
    if not contender.alone:
        yield Task(name, model, workloads, budgets, turn)
        return
    for budget in budgets:
        for workload in workloads:
            yield Task(name, model, (workload,), (budget,), turn)


def at_peers_memory(
    rows: Table, workloads: tuple[str, ...], peers: list[str], turn: int
) -> tuple[dict[str, Any], ...]:
    """Bounds for Superpipeline: what each peer was measured to take, the least where it varied."""
    taken: dict[str, int] = {}
    for row in rows.of_this_kind(round=turn):
        if row["workload"] not in workloads or row["contender"] not in peers:
            continue
        num_bytes = row.get("measured weight bytes") or row.get("budget bytes")
        if "ms" in row and num_bytes:
            label = f"as {row['contender']}, {row['budget']}"
            taken[label] = min(num_bytes, taken.get(label, num_bytes))
    return tuple({"label": label, "num_bytes": n} for label, n in taken.items())


def carry_out(task: Task, args: argparse.Namespace, rows: Table) -> None:
    """Runs the task's process until it ends, or is stopped at the time limit."""
    file = args.out / f"{args.name}-part.json"  # kept if this process is killed too
    file.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "benchmarks.peers.worker",
        "--contender", task.contender, "--model", task.model,
        "--workloads", ",".join(task.workloads), "--budgets", json.dumps(task.budgets),
        "--plain", json.dumps(rows.plain(task.workloads)), "--rows", str(file),
        "--device", args.device, "--size", args.size, "--deadline", str(args.deadline),
        "--seconds", str(args.seconds), "--link", str(args.link),
        "--repeats", str(args.repeats), "--round", str(task.round),
    ]  # fmt: skip
    ended = _run(command, args)
    found = json.loads(file.read_text()) if file.exists() else []
    file.unlink(missing_ok=True)
    for row in found:
        row["process s"] = ended.seconds
    if ended.problem:
        found += _missing(task, found, ended.problem, args)
    rows.add(found)


class Ended(NamedTuple):
    """How long a process took, and what was wrong with its end."""

    seconds: float
    problem: str


def _run(command: list[str], args: argparse.Namespace) -> Ended:
    environment = {**os.environ, **(pacing_environment(args.link) if args.link else {})}
    begin = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{args.name}.log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            code = process.wait(timeout=max(1.0, args.deadline + 10 - begin))
            problem = f"the process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            problem = ""  # no failure of the contender's: what it has not measured is not a row
    return Ended(round(time.time() - begin, 1), problem)


def _missing(task: Task, found: list[Row], problem: str, args: argparse.Namespace) -> list[Row]:
    """A row with the problem for each measurement that the process should have made and did not."""
    have = {(row["budget"], row["workload"]) for row in found}
    return [
        {
            "contender": task.contender, "workload": workload, "budget": budget["label"],
            "size": args.size, "paced GB/s": args.link or None, "round": task.round,
            "error": problem,
        }
        for budget in task.budgets for workload in task.workloads
        if (budget["label"], workload) not in have
    ]  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(FIRST_TABLE), help="contenders, comma-separated")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--budgets", default="25%,50%,75%")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--link", type=float, default=0, help="GB/s that the link is paced to")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each workload")
    parser.add_argument("--rounds", type=int, default=1, help="the whole list, so many times")
    parser.add_argument("--seconds", type=float, default=6, help="for one row, about")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--no-pairs", action="store_true", help="not at the peers' memory")
    parser.add_argument(
        "--pairs-only", action="store_true", help="at the memory of peers that were measured before"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.name = "peers" if args.size == "full" else f"peers-{args.size}"
    args.deadline = time.time() + args.time_limit
    return args


def main() -> None:
    args = parse()
    rows = Table(args)
    for task in tasks(args, rows):
        if time.time() > args.deadline:
            print("no time left for", task.contender, task.model)
            continue
        carry_out(task, args, rows)
        shown = rows.of_this_kind(contender=task.contender, round=task.round)
        shown = [row for row in shown if row["workload"] in task.workloads]
        print(table([_short(row) for row in shown]) if shown else "nothing measured", flush=True)


def _short(row: Row) -> Row:
    gib = {
        name: row[key] / 2**30 if row.get(key) else "-"
        for name, key in (("weights", "measured weight bytes"), ("peak", "peak allocated"))
    }
    names = ("contender", "workload", "budget", "ms", "ratio", "equal", "setup s", "error")
    return (
        {name: row.get(name, "-") for name in names[:3]}
        | gib
        | {name: row.get(name, "-") for name in names[3:]}
    )


if __name__ == "__main__":
    main()
