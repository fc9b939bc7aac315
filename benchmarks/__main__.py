"""Runs every benchmark that this machine can run: `python -m benchmarks`."""

import subprocess
import sys

import torch

NAMES = ["visit_cost", "cpu_disk", "training", *(["llama"] if torch.cuda.is_available() else [])]

for name in NAMES:
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
