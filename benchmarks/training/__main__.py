"""Training beside its bound: plain, streamed, and PyTorch's FSDP2 with offload, one process each.

    python -m benchmarks.training                          # on a GPU: 1B, then 8B in 24 GiB
    python -m benchmarks.training --parts 1b --only terms,plain,lazy
    python -m benchmarks.training --device cpu             # 110M parameters
    python -m benchmarks.training --parts 1b --only reference,plain,streamed,lazy --deterministic
    python -m benchmarks.training --tiny --device cpu      # a rehearsal of all parts

Rows are added to results/training-<device>.json after each process (a row measured again takes the
old one's place), so a run can be cut off, or made in parts. "terms" measures what bounds a step.
The losses' bits of every other row are compared with "reference", the plain model stepped on the
host, for the workload that it runs.

On a CPU one half of the cores computes, and the optimizer's worker and the copies have the other:
with all of them computing, to overlap would gain nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, save, table
from benchmarks.training.bound import Terms, bound_s, first_forward_bound_s
from benchmarks.training.contenders import CONTENDERS
from benchmarks.training.parts import PARTS

Row = dict[str, Any]
_KEY = ("part", "size", "contender", "tokens", "clips")
ORDER = ("terms", "reference", *(name for name in CONTENDERS if name != "reference"))


class Table:
    """All rows so far, on disk after each change."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[Row] = []
        path = args.out / f"{args.name}.json"
        if path.exists():
            self.rows = json.loads(path.read_text())["figures"]

    def add(self, rows: list[Row]) -> None:
        fresh = {tuple(row.get(key) for key in _KEY) for row in rows}
        kept = [row for row in self.rows if tuple(row.get(k) for k in _KEY) not in fresh]
        self.rows = kept + rows
        for row in self.rows:
            row.pop("equal", None)
            row.update(self._compared(row))
        save(self.args.name, self.rows, self.args.out)

    def _find(self, row: Row, contender: str, **wanted: Any) -> Row:
        wanted |= {"part": row["part"], "size": row["size"], "contender": contender}
        return next((r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())), {})

    def _compared(self, row: Row) -> Row:
        """The row beside its bound, the plain run and the reference's bits."""
        if "s" not in row:
            return {}
        found: Row = {}
        measured = self._find(row, "terms", tokens=row["tokens"]).get("terms")
        if measured:
            terms = Terms(**measured)
            found["bound s"] = bound_s(terms, clips=row["clips"])
            found["of bound"] = found["bound s"] / row["s"]
            found["first forward bound s"] = first_forward_bound_s(terms, clips=row["clips"])
        plain = self._find(row, "plain", tokens=row["tokens"], clips=row["clips"])
        if "s" in plain:
            found["of plain"] = plain["s"] / row["s"]
        theirs = self._find(row, "reference", tokens=row["tokens"], clips=row["clips"])
        if not theirs and self.args.device == "cpu":
            theirs = plain  # which is stepped on the host as well
        # On a GPU the plain model's backward differs from itself otherwise.
        is_fair = self.args.device == "cpu" or self.args.deterministic
        if "digests" in theirs and is_fair:
            found["equal"] = row["digests"] == theirs["digests"]
        return found

    def show(self, part: str) -> None:
        rows = [row for row in self.rows if row["part"] == part and row["size"] == self.args.size]
        if rows:
            print(table([_short(row) for row in rows]), flush=True)


def carry_out(part: str, contender: str, args: argparse.Namespace, rows: Table) -> None:
    """Runs one process until it ends, or is stopped at its limit."""
    file = args.out / f"{args.name}-part.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    end = min(time.time() + args.limit, args.deadline)
    command = [
        sys.executable, "-m", "benchmarks.training.worker", "--part", part,
        "--contender", contender, "--size", args.size, "--device", args.device,
        "--rows", str(file), "--weights", args.weights, "--deadline", str(end),
        "--steps", str(args.steps), "--threads", str(args.threads), "--tokens", args.tokens,
        *(["--deterministic"] if args.deterministic else []),
    ]  # fmt: skip
    problem = _run(command, end, args)
    found = json.loads(file.read_text()) if file.exists() else []
    file.unlink(missing_ok=True)
    if problem and not found:
        found = [{"part": part, "size": args.size, "contender": contender, "error": problem}]
    rows.add(found)


def _run(command: list[str], end: float, args: argparse.Namespace) -> str:
    """What was wrong with the process's end."""
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    if args.deterministic:
        threads["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    with (args.out / f"{args.name}.log").open("a") as log:
        process = subprocess.Popen(command, env=os.environ | threads, stdout=log, stderr=log)
        try:
            code = process.wait(timeout=max(1.0, end + 20 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "stopped at its time limit"
    return f"the process ended with {code}" if code else ""


def _short(row: Row) -> Row:
    gib = 2**30
    on_device = row.get("peak allocated") or row.get("weights on device")
    shown = {
        "part": row["part"], "contender": row["contender"], "tokens": row.get("tokens"),
        "clips": row.get("clips"), "s": row.get("s"), "tokens/s": row.get("tokens/s"),
        "TFLOP/s": row.get("TFLOP/s"), "device GiB": on_device and on_device / gib,
        "host GiB": row["host bytes"] / gib if "host bytes" in row else None,
        "bound s": row.get("bound s"), "of bound": row.get("of bound"),
        "of plain": row.get("of plain"), "equal": row.get("equal"),
        "notes": row.get("error") or _in_words(row.get("terms", {})),
    }  # fmt: skip
    return {name: "-" if value is None else value for name, value in shown.items()}


def _in_words(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.3f}" for name, seconds in terms.items())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with small models")
    parser.add_argument("--parts", default="", help=f"of {','.join(PARTS)}")
    parser.add_argument("--only", default=",".join(ORDER), help="contenders")
    parser.add_argument("--weights", default="", help="another bound than the part's")
    parser.add_argument("--tokens", default="", help="other numbers of tokens a step")
    parser.add_argument(
        "--deterministic", action="store_true",
        help="equality on a GPU: else the plain model's backward differs from itself",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each workload")
    parser.add_argument("--threads", type=int, default=-1, help="for compute; 0 for torch's own")
    parser.add_argument("--limit", type=float, default=420, help="seconds for one process")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    on_cpu = torch.device(args.device).type == "cpu"
    args.size = "tiny" if args.tiny else "full"
    args.name = f"training-{args.device.partition(':')[0]}{'-tiny' if args.tiny else ''}"
    args.name += "-deterministic" if args.deterministic else ""
    args.parts = args.parts or (",".join(PARTS) if args.tiny else "cpu" if on_cpu else "1b,8b")
    if args.threads < 0:
        args.threads = max(1, (os.cpu_count() or 2) // 2) if on_cpu else 0
    args.deadline = time.time() + args.time_limit
    return args


def main() -> None:
    args = parse()
    rows = Table(args)
    for part in args.parts.split(","):
        for contender in args.only.split(","):
            if time.time() > args.deadline:
                print("no time left for", part, contender)
                continue
            carry_out(part, contender, args, rows)
        rows.show(part)
    print(args.out / f"{args.name}.json")


if __name__ == "__main__":
    main()
