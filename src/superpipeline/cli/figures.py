"""The figures of one run: measured beside the floor, as a table and as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from superpipeline.cli.generate import Generation
from superpipeline.cli.request import Request
from superpipeline.pipeline import Pipeline
from superpipeline.sizes import format_bytes


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one run took; times are of tokens after the first."""

    model: str
    device: str
    dtype: str
    weights: str | None
    k: int | None
    k_prime: int | None
    host_memory: str | None
    prompt: str
    text: str
    num_tokens: int
    weight_bytes: int
    bound_bytes: int
    resident_bytes: int
    window_bytes: int
    host_bytes: int
    peak_weight_bytes: int
    streamed_bytes: int
    streamed_bytes_per_token: float
    disk_bytes: int
    late_fetches: int
    link_rate_bytes_per_s: float
    first_token_s: float
    seconds_per_token: float
    tokens_per_s: float
    plain_seconds_per_token: float | None
    floor_seconds_per_token: float
    times_floor: float | None
    verified: bool | None = None

    def write_json(self, file: Path) -> None:
        """Write every figure under its own name."""
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def print_table(self) -> None:
        """Print the figures that a person looks for."""
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, value in self._rows():
            table.add_row(name, value)
        Console(highlight=False).print(table)

    def _rows(self) -> list[tuple[str, str]]:
        bound = f"{format_bytes(self.bound_bytes)} ({self._bound_source()})"
        plain_s = self.plain_seconds_per_token
        plain = "n/a (--verify measures it)" if plain_s is None else f"{1 / plain_s:.2f} tokens/s"
        times = "n/a" if self.times_floor is None else f"{self.times_floor:.2f}x the floor"
        return [
            ("weights", f"{format_bytes(self.weight_bytes)}, {self.dtype}"),
            ("bound", bound),
            ("peak weight bytes", f"{format_bytes(self.peak_weight_bytes)} on {self.device}"),
            ("streamed", self._per_token(self.streamed_bytes)),
            ("from disk", self._per_token(self.disk_bytes)),
            ("link rate", f"{self.link_rate_bytes_per_s / 1e9:.1f} GB/s"),
            ("first token", f"{self.first_token_s:.2f} s"),
            ("speed", f"{self.tokens_per_s:.2f} tokens/s after the first"),
            ("plain model", plain),
            ("floor", f"{self.floor_seconds_per_token * 1e3:.1f} ms a token; this run: {times}"),
        ]

    def _per_token(self, num_bytes: int) -> str:
        return f"{format_bytes(round(num_bytes / self.num_tokens))} a token"

    def _bound_source(self) -> str:
        if self.k is not None:
            return f"k={self.k}" + (f", k'={self.k_prime}" if self.k_prime is not None else "")
        return str(self.weights)


def collect(
    request: Request,
    handle: Pipeline,
    streamed: Generation,
    *,
    plain: Generation | None,
    **facts: Any,
) -> Figures:
    """Put together what the run measured; `facts`: its text and dtype."""
    memory = _memory(handle, len(streamed.token_ids))
    plain_s = None if plain is None else plain.seconds_per_token
    floor_s = floor_seconds(
        weight_bytes=memory["weight_bytes"],
        bound_bytes=memory["bound_bytes"],
        link_rate=handle.link_rate,
        plain_s=plain_s,
    )
    asked = {
        name: getattr(request, name)
        for name in ("model", "weights", "k", "k_prime", "host_memory", "prompt")
    }
    return Figures(
        device=str(request.device),
        link_rate_bytes_per_s=handle.link_rate,
        first_token_s=streamed.first_token_s,
        seconds_per_token=streamed.seconds_per_token,
        tokens_per_s=1 / streamed.seconds_per_token,
        plain_seconds_per_token=plain_s,
        floor_seconds_per_token=floor_s,
        times_floor=streamed.seconds_per_token / floor_s if floor_s > 0 else None,
        **asked,
        **memory,
        **facts,
    )


def _memory(handle: Pipeline, num_tokens: int) -> dict[str, Any]:
    plan, stats = handle.plan, handle.stats()
    return {
        "num_tokens": num_tokens,
        "weight_bytes": plan.weight_bytes,
        # Where k was given, what its plan takes is the bound.
        "bound_bytes": plan.device_bytes if plan.bound_bytes is None else plan.bound_bytes,
        "resident_bytes": plan.resident_bytes,
        "window_bytes": plan.window_bytes,
        "host_bytes": handle.host_bytes,
        "peak_weight_bytes": stats.peak_device_bytes,
        "streamed_bytes": stats.streamed_bytes,
        "streamed_bytes_per_token": stats.streamed_bytes / num_tokens,
        "disk_bytes": stats.disk_bytes,
        "late_fetches": stats.late_fetches,
    }


def floor_seconds(
    *, weight_bytes: int, bound_bytes: int, link_rate: float, plain_s: float | None
) -> float:
    """The least time of a token under the bound, whatever the engine does.

    One token is one pass over the weights: residents filling the whole bound leave the rest to
    cross the link, and no run is faster than the plain model.
    """
    least_bytes = max(0, weight_bytes - bound_bytes)
    return max(plain_s or 0.0, least_bytes / link_rate)
