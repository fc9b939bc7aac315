"""What does streaming from disk cost on a CPU, beside memory and beside accelerate's disk offload?

Greedy generation with a cache of keys and values. Contenders live in processes of their own and
take turns, so that what disturbs the machine disturbs all alike; figures are medians over rounds.

    in memory                 the plain model, every weight in memory
    mapped                    the plain model over mapped files, as from_pretrained gives it
    streamed from memory      superpipeline under the bound, every weight in memory
    from disk                 superpipeline.load under the bound; the files are cached
    from disk, cold start     the files were dropped from the page cache before the run
    from disk, uncached       every byte comes from the disk, every pass
    accelerate.disk_offload   its files are cached

The floor of a row is max(in memory, bytes that came from the disk / read rate of the same files,
measured cold in the same round).

    python -m benchmarks.cpu_disk            # SmolLM2-135M at 50%, 24 tokens (`make demo` first)
    python -m benchmarks.cpu_disk --large    # 3B parameters, random, at 10% and 50%, 4 tokens
    python -m benchmarks.cpu_disk --tiny     # a rehearsal

`--large` writes 12 GB and needs 18 GB of memory that is free, so it leaves out what needs another
copy of the weights there (mapped, streamed from memory). `--group FOLDER` puts all but "in memory"
into a control group that you made, to limit their memory.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cpu_disk import cache
from benchmarks.cpu_disk.contender import Spec
from benchmarks.cpu_disk.random_llama import llama_config, write
from benchmarks.record import save, table

SMOL = Path("demo/SmolLM2-135M-Instruct")
THREE_B = {"layers": 28, "hidden": 3072, "intermediate": 8192, "vocab": 32000}
TINY = {"layers": 6, "hidden": 256, "intermediate": 1024, "vocab": 1024}
PLAIN, MAPPED, STREAMED = "in memory", "mapped", "streamed from memory"
WARM, COLD_START, UNCACHED = "from disk", "from disk, cold start", "from disk, uncached"
OFFLOAD = "accelerate.disk_offload"
SHOWN = (
    "contender", "bound", "ms a token", "times memory", "times offload", "times floor", "equal",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One set of weights and how it is run."""

    name: str
    model: str
    bounds: tuple[str, ...]
    num_tokens: int
    config: dict[str, int] | None = None  # of random weights; None: the demo's
    is_large: bool = False


JOBS = {
    "tiny": Job("cpu-disk-tiny", "Llama, 6 layers, random", ("50%",), 4, TINY),
    "small": Job("cpu-disk", "SmolLM2-135M, bf16", ("50%",), 24),
    "large": Job(
        "cpu-disk-3b", "Llama, 3B, random bf16", ("10%", "50%"), 4, THREE_B, is_large=True
    ),
}


@dataclass
class Row:
    """One contender under one bound, and its runs.

    Attributes:
        files: what it reads.
    """

    name: str
    bound: str | None
    process: "subprocess.Popen[str]"
    files: list[Path]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """Once more: from the disk, or with files cached as a run of its own left them.

        (How they were read matters: in pages of 2 MiB they are mapped many times as fast.)
        """
        cache.drop(self.files)
        if self.name not in {COLD_START, UNCACHED, PLAIN, STREAMED}:
            _ask(self.process, "cached")
        self.runs.append(_ask(self.process, "uncached" if self.name == UNCACHED else "cached"))

    def median(self, key: str) -> float:
        return median(run.get(key, 0) for run in self.runs)


# ---- processes ----------------------------------------------------------------------------------


@contextmanager
def started(spec: Spec) -> Iterator["subprocess.Popen[str]"]:
    """A contender that is ready; it ends with the block."""
    command = [sys.executable, "-m", "benchmarks.cpu_disk.contender", spec.to_json()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            print(f"   {_answer(process)['ready']} {spec.bound or ''}", flush=True)
            yield process
        finally:
            process.kill()


def _ask(process: "subprocess.Popen[str]", how: str) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(f"{how}\n")
    process.stdin.flush()
    return _answer(process)


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended with {process.wait()}; its error is above")
    return json.loads(line)


def contenders(job: Job, folder: Path, scratch: Path, args: argparse.Namespace) -> list[Spec]:
    """Each process that takes part; the plain model is the first."""

    def spec(kind: str, folder: Path = folder, **more: Any) -> Spec:
        group = None if kind == PLAIN else args.group
        return Spec(kind=kind, folder=str(folder), num_tokens=job.num_tokens, group=group, **more)

    more = []
    if not job.is_large:
        more = [spec(MAPPED), *(spec(STREAMED, bound=bound) for bound in job.bounds)]
    # Files of their own: what another process has mapped can neither be dropped nor read anew.
    own = Path(shutil.copytree(folder, scratch / "copy"))
    from_disk = [spec(WARM, own, bound=bound) for bound in job.bounds]
    offloaded = spec(OFFLOAD, offload_folder=str(scratch / "offload"))
    return [spec(PLAIN), *more, *from_disk, offloaded]


def _files(spec: Spec) -> list[Path]:
    """What it reads."""
    if spec.offload_folder is not None:
        return sorted(Path(spec.offload_folder).glob("*.dat"))
    return sorted(Path(spec.folder).glob("*.safetensors"))


# ---- the rounds ---------------------------------------------------------------------------------


def measure(
    job: Job, folder: Path, scratch: Path, args: argparse.Namespace
) -> tuple[list[Row], list[float]]:
    """Every contender in every round; the rows, and the disk's rate in each round."""
    with ExitStack() as stack:
        rows = []
        for spec in contenders(job, folder, scratch, args):
            process = stack.enter_context(started(spec))
            names = (WARM, COLD_START, UNCACHED) if spec.kind == WARM else (spec.kind,)
            rows += [Row(name, spec.bound, process, _files(spec)) for name in names]
        rates = []
        for number in range(args.repeats):
            print(f"   round {number + 1} of {args.repeats}", flush=True)
            rates.append(cache.cold_rate(next(row.files for row in rows if row.name == WARM)))
            for row in rows:
                row.run()
    return rows, rates


def figures(rows: list[Row], rate: float, num_tokens: int) -> list[dict[str, Any]]:
    """Each row beside memory, its floor and accelerate."""
    named = {row.name: row for row in rows}
    plain, offloaded = named[PLAIN], named[OFFLOAD]
    plain_s, offloaded_s = plain.median("seconds"), offloaded.median("seconds")
    bits = plain.runs[0]["digest"]
    found = []
    for row in rows:
        seconds = row.median("seconds")
        floor = max(plain_s, row.median("storage bytes") / rate)
        found.append({
            "contender": row.name, "bound": row.bound or "", "seconds": seconds,
            "ms a token": seconds / num_tokens * 1e3,
            "times memory": seconds / plain_s,
            "times offload": seconds / offloaded_s,
            "floor s": floor, "times floor": seconds / floor,
            "CPU s": row.median("cpu seconds"),
            "streamed GB": row.median("disk bytes") / 1e9,
            "storage GB": row.median("storage bytes") / 1e9,
            "late": row.median("late fetches"),
            "equal": all(run["digest"] == bits for run in row.runs),
            "all seconds": [round(run["seconds"], 4) for run in row.runs],
        })  # fmt: skip
    return found


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """What was asked of the rows from disk, and whether it was reached."""
    lines = []
    for row in rows:
        if row["contender"] == WARM:
            lines.append(_verdict(row, "times memory", 1.4, "in memory"))
            lines.append(_verdict(row, "times offload", 1 / 3, OFFLOAD))
        elif row["contender"] in {COLD_START, UNCACHED}:
            lines.append(_verdict(row, "times floor", 1.15, "the floor"))
    return lines


def _verdict(row: dict[str, Any], key: str, most: float, of: str) -> str:
    reached = "reached" if row[key] <= most else "MISSED"
    equal = "" if row["equal"] else ", NOT EQUAL"
    return (
        f"{row['contender']} at {row['bound']}: {row[key]:.3f} of {of}, wanted <= {most:.3f}: "
        f"{reached}{equal}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiny", action="store_const", dest="size", const="tiny", default="small")
    size.add_argument("--large", action="store_const", dest="size", const="large")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to be measured")
    parser.add_argument("--group", help="folder of a control group for all but 'in memory'")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    job = JOBS[args.size]
    if job.config is None and not SMOL.is_dir():
        raise SystemExit(f"there is no {SMOL}: run `make demo` first")
    # Not the default temporary folder: that may be memory.
    with tempfile.TemporaryDirectory(dir=args.scratch or Path.cwd(), prefix="cpu-disk-") as scratch:
        folder = SMOL
        if job.config is not None:
            folder = Path(scratch, "model")
            write(folder, llama_config(**job.config))
        rows, rates = measure(job, folder, Path(scratch), args)
    found = figures(rows, median(rates), job.num_tokens)
    record = {
        "model": job.model, "tokens": job.num_tokens, "repeats": args.repeats, "rows": found,
        "disk GB/s": [round(rate / 1e9, 3) for rate in rates], "targets": targets(found),
    }  # fmt: skip
    print(save(job.name, record, args.out), f"disk: {median(rates) / 1e9:.2f} GB/s", sep="\n")
    print(*targets(found), table([{key: row[key] for key in SHOWN} for row in found]), sep="\n")


if __name__ == "__main__":
    main()
