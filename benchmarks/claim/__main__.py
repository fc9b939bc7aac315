"""All of the claim: memory and speed of three models, and what the freed memory buys.

    python -m benchmarks.claim                               # on a GPU
    python -m benchmarks.claim --only llm,capacity --time-limit 300
    python -m benchmarks.claim --size tiny --device cpu      # a rehearsal

Each part is a process of its own and writes its results as it goes. `python -m
benchmarks.claim.tables` makes tables and plots of them.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.claim.models import MODELS
from benchmarks.peers.workloads import SIZES
from benchmarks.record import RESULTS

PARTS = (*MODELS, "capped", "capacity")


def command(part: str, args: argparse.Namespace, seconds: float) -> list[str]:
    module, more = "benchmarks.claim.memory", ["--model", part]
    if part == "capped":  # 15 GiB of weights on a device of 12
        more = ["--model", "llm", "--cap-gib", "12", "--bounds", "25%,50%", "--pairs", "4:2"]
    if part == "capacity":
        module, more = "benchmarks.claim.capacity", []
        if args.device == "cpu":
            more = ["--cap-gib", "0.03", "--bounds", "plain,40%"]
    shared = ["--size", args.size, "--device", args.device, "--out", str(args.out)]
    return [sys.executable, "-m", module, *more, *shared, "--time-limit", f"{seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    deadline = time.time() + args.time_limit
    for part in args.only.split(","):
        left = deadline - time.time()
        if left < 1:
            print("no time left for", part)
            continue
        begin = time.time()
        subprocess.run(command(part, args, left), check=False)
        print(f"{part}: {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
