"""One process, one contender, one model: every workload's steps, each row written as it is there.

Started by `python -m benchmarks.training`. The contender "terms" measures what bounds a step.
"""

import argparse
import gc
import hashlib
import json
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.peers import gauge
from benchmarks.training import terms
from benchmarks.training.contenders import CONTENDERS, Job, Ready
from benchmarks.training.parts import Part, batches, build, flops_a_token, part_of
from superpipeline.sizes import parse_bytes

Row = dict[str, Any]
_WARM_UPS = 2


class Run:
    """The state of one worker, and its rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = gauge.device_named(args.device)
        self.part: Part = part_of(args.part, args.size)
        if args.tokens:
            chosen = tuple(map(int, args.tokens.split(",")))
            self.part = self.part._replace(tokens=chosen)
        self.weights = args.weights or self.part.weights[args.size]
        self.rows: list[Row] = []
        self.host_before = 0
        self.steps_done = 0

    def all(self) -> None:
        if self.args.threads:
            torch.set_num_threads(self.args.threads)
        if self.args.deterministic:
            gauge.make_deterministic()
        gauge.begin_peaks(self.device)
        try:
            model = build(self.part, self.args.size, self.device)
            gauge.begin_peaks(self.device)
            self.host_before = gauge.begin_host_peak() - _num_bytes(model)
            if self.args.contender == "terms":
                self.measure_terms(model)
            else:
                self.train(model)
        except Exception as error:  # noqa: BLE001  (a contender that fails is a row)
            traceback.print_exc()
            self.add({"error": f"{type(error).__name__}: {error}"[:400]})

    # ---- terms ------------------------------------------------------------------------------

    def measure_terms(self, model: nn.Module) -> None:
        """One row for each workload. The optimizer comes first: it has the host to itself."""
        rate = terms.rates(self.device)
        host = terms.optimizer_ms(list(model.parameters()))
        for tensor in (*model.parameters(), *model.buffers()):
            is_wide = isinstance(tensor, nn.Parameter)
            tensor.data = tensor.data.to(
                self.device, self.part.computes if is_wide else tensor.dtype
            )
        gc.collect()
        compute_bytes = _num_bytes(model)
        bound_bytes = parse_bytes(self.weights, compute_bytes)
        for tokens in self.part.tokens:
            micro = self.part.micro_batches(tokens)
            self.note(f"measures forward and backward of {tokens} tokens")
            forward, backward = terms.compute_ms(
                model, self.part, self.args.size, tokens, self.device
            )
            link = terms.link_s(compute_bytes, bound_bytes, micro, rate)
            self.add({
                "tokens": tokens, "micro-batches": micro, "rates": rate, **host,
                "terms": {
                    "forward": forward * micro / 1e3, "backward": backward * micro / 1e3,
                    "first_forward": forward / 1e3, "optimizer": host["optimizer ms"] / 1e3,
                    "link": link,
                },
            })  # fmt: skip

    # ---- training ---------------------------------------------------------------------------

    def train(self, model: nn.Module) -> None:
        """All workloads, each with and without clipping, on one model that goes on training."""
        flops = flops_a_token(model)
        self.note("sets up")
        begin = time.perf_counter()
        ready = CONTENDERS[self.args.contender](Job(model, self.part, self.device, self.weights))
        gauge.settle(self.device)
        setup_s = time.perf_counter() - begin
        if ready.handle is not None and self.part.cap_bytes:
            gauge.cap(self.device, self.part.cap_bytes)
        # Whose bits are compared with needs no more than the first workload, and is slow.
        is_short = self.args.contender == "reference"
        for tokens in self.part.tokens[: 1 if is_short else None]:
            for clips in (True,) if is_short else (True, False):
                if time.time() > self.args.deadline:
                    return self.note("no time left")
                self.note(f"trains {tokens} tokens a step, clipping: {clips}")
                row = self.measured(ready, tokens, clips=clips)
                row |= {"setup s": setup_s, "settings": ready.settings}
                row["TFLOP/s"] = flops * row["tokens/s"] / 1e12
                self.add(row)
        return None

    def measured(self, ready: Ready, tokens: int, *, clips: bool) -> Row:
        losses = [self.step(ready, tokens, clips=clips) for _ in range(_WARM_UPS)]
        gauge.settle(self.device)
        gauge.forget_peaks(self.device)
        before = ready.handle.stats() if ready.handle else None
        marks = [gauge.mark(self.device)]
        for _ in range(self.args.steps):
            losses.append(self.step(ready, tokens, clips=clips))
            marks.append(gauge.mark(self.device))
        ready.finish()
        gauge.settle(self.device)
        samples = gauge.between_ms(marks)
        peaks, seconds = gauge.peaks(self.device), median(samples) / 1e3
        row: Row = {
            "tokens": tokens, "clips": clips, "s": seconds, "samples ms": samples,
            "tokens/s": tokens / seconds, "steps/s": 1 / seconds,
            "digests": [_digest(step) for step in losses],
            "peak allocated": peaks.allocated, "peak reserved": peaks.reserved,
            "host bytes": gauge.host_peak() - self.host_before,
        }  # fmt: skip
        return row | (self.streamed(ready, before) if ready.handle else {})

    def streamed(self, ready: Ready, before: Any) -> Row:
        """What Superpipeline says of itself."""
        stats = ready.handle.stats()
        return {
            "weights on device": stats.peak_device_bytes,
            "gradients on device": stats.gradient_bytes_peak,
            "streamed bytes": (stats.streamed_bytes - before.streamed_bytes) / self.args.steps,
            "late fetches": (stats.late_fetches - before.late_fetches) / self.args.steps,
        }

    def step(self, ready: Ready, tokens: int, *, clips: bool) -> torch.Tensor:
        """One optimizer step; its losses, which nobody has waited for."""
        losses = []
        micro_batches = self.part.micro_batches(tokens)
        for ids in batches(self.part, self.args.size, tokens, self.steps_done):
            there = ids.to(self.device, non_blocking=True)
            loss = ready.model(input_ids=there, labels=there).loss
            (loss / micro_batches).backward()
            ready.after_backward()
            losses.append(loss.detach())
        if clips:
            ready.clip(ready.stepped, 1.0)
        ready.optimizer.step()
        ready.optimizer.zero_grad()
        ready.after_step()
        self.steps_done += 1
        return torch.stack(losses).float()

    # ---- rows -------------------------------------------------------------------------------

    def add(self, row: Row) -> None:
        threads = torch.get_num_threads()
        head = {"part": self.args.part, "contender": self.args.contender, "size": self.args.size}
        self.rows.append(head | {"weights": self.weights, "threads": threads} | row)
        Path(self.args.rows).write_text(json.dumps(self.rows, indent=1))

    def note(self, text: str) -> None:
        now = time.strftime("%H:%M:%S")
        print(f"{now} {self.args.part}, {self.args.contender}: {text}", file=sys.stderr, flush=True)


def _digest(losses: torch.Tensor) -> str:
    return hashlib.sha256(losses.cpu().numpy().tobytes()).hexdigest()[:16]


def _num_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("contender", "part", "size", "device", "rows"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--weights", default="")
    parser.add_argument("--tokens", default="")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--deadline", type=float, required=True)
    for name in ("steps", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    Run(parser.parse_args()).all()


if __name__ == "__main__":
    main()
