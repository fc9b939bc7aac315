"""The tables of docs/larger-than-memory.md, from what the benchmark wrote.

python -m benchmarks.cpu_disk.tables                      # into the document
python -m benchmarks.cpu_disk.tables --suffix=-tiny --print --results FOLDER  # a rehearsal
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.claim.tables import TIMES, markdown, write_into, yes
from benchmarks.record import RESULTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "larger-than-memory.md"
NAMES = ("cpu-disk", "cpu-disk-3b")
HEAD = ("what", "bound", "ms a token", "of in memory", "of disk_offload", "of the floor", "equal")
FLOOR = (
    "*floor* = max(in memory, bytes that came from the disk / read rate of the same files, "
    "measured in the same run)."
)


def text(results: Path = RESULTS, suffix: str = "") -> str:
    """All tables; empty where there are no results."""
    parts = []
    for name in NAMES:
        path = results / f"{name}{suffix}.json"
        if path.exists():
            parts.append(_part(json.loads(path.read_text()), path.name))
    return "\n\n".join([FLOOR, *parts]) if parts else ""


def _part(found: dict[str, Any], file: str) -> str:
    e, f = found["environment"], found["figures"]
    disk = median(f["disk GB/s"])
    title = f"**{f['model']}**, {f['tokens']} tokens, a disk of {disk:.2f} GB/s"
    packages = ("python", "torch", "transformers", "accelerate")
    versions = ", ".join(f"{package} {e[package]}" for package in packages if e.get(package))
    source = (
        f"{e['device']}, {e['cores']} cores, {e['threads']} threads; {versions}; {e['date']}; "
        f"medians of {f['repeats']}; `{e['command']}`; [{file}](../benchmarks/results/{file})."
    )
    return "\n\n".join((title, markdown(HEAD, map(_row, f["rows"])), source))


def _row(row: dict[str, Any]) -> list[str]:
    times = [f"{row[key]:.2f}{TIMES}" for key in ("times memory", "times offload", "times floor")]
    return [row["contender"], row["bound"], f"{row['ms a token']:.0f}", *times, yes(row["equal"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--suffix", default="", help="-tiny for a rehearsal's results")
    parser.add_argument("--print", action="store_true", help="leave the document as it is")
    args = parser.parse_args()
    found = text(args.results, args.suffix)
    print(found or "no results")
    if found and not args.print:
        assert write_into(DOCUMENT, "cpu_disk", found)


if __name__ == "__main__":
    main()
