"""Plots of the claim and of the peers: speed over device memory, the 60% line drawn."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.claim.models import CASES, NAMES
from benchmarks.claim.tables import is_streamed, read

Row = dict[str, Any]
_LESS = 0.60  # what the method's paper promises: up to so much less device memory


def draw(args: argparse.Namespace) -> Iterator[Path]:
    """Draws what there are results for; the files' paths."""
    models = {model: read(f"claim-{model}", args) for model in NAMES}
    found = {model: result["figures"] for model, result in models.items() if result}
    if found:
        yield _claim(found, args.results / f"claim{args.suffix}.svg")
    peers = read("peers", args)
    if peers:
        yield _peers(peers["figures"], args.results / f"peers{args.suffix}.svg")


def _claim(found: dict[str, list[Row]], path: Path) -> Path:
    """A panel for each model: each row's speed over its share of the plain run's peak memory."""
    figure, panels = plt.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False)
    for axes, (model, rows) in zip(panels[0], found.items(), strict=True):
        for workload in CASES[model]:
            own = [row for row in rows if row.get("workload") == workload and "ms" in row]
            _curve(axes, workload, own)
        axes.axvline(1 - _LESS, color="black", linestyle="--", linewidth=1)
        axes.text(1 - _LESS, 1.06, " 60% less", fontsize=8)
        axes.set(title=NAMES[model], xlabel="peak device memory / plain", xlim=(0, 1.1))
        axes.set(ylabel="speed / plain", ylim=(0, 1.15))
        axes.legend(fontsize=7, loc="lower right")
    figure.suptitle("Peak device memory of everything, and speed (lines: weights=, crosses: k, k')")
    return _saved(figure, path)


def _curve(axes: Axes, workload: str, rows: list[Row]) -> None:
    plain = next((row for row in rows if row["setting"] == "plain"), None)
    if plain is None:
        return
    points = sorted(
        (_memory(row) / _memory(plain), plain["ms"] / row["ms"], row["setting"]) for row in rows
    )
    bounds = [(x, y) for x, y, setting in points if not setting.startswith("k=")]
    pairs = [(x, y) for x, y, setting in points if setting.startswith("k=")]
    (line,) = axes.plot(*zip(*bounds, strict=True), marker="o", markersize=4, label=workload)
    if pairs:
        axes.plot(*zip(*pairs, strict=True), "x", color=line.get_color())


def _memory(row: Row) -> float:
    """Peak device bytes; in a rehearsal without a device, the bytes of weights."""
    return row["peak allocated"] or row.get("device weight bytes") or row["weights"]


def _peers(rows: list[Row], path: Path) -> Path:
    """A panel for each workload: each tool's time over the weights it kept on the device."""
    rows = [r for r in rows if "ms" in r and not r.get("paced GB/s")]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    size = (5 * len(workloads), 4)
    figure, panels = plt.subplots(1, len(workloads), figsize=size, squeeze=False)
    for axes, workload in zip(panels[0], workloads, strict=True):
        own = [row for row in rows if row["workload"] == workload]
        for contender in dict.fromkeys(row["contender"] for row in own):
            points = sorted(_point(row) for row in own if row["contender"] == contender)
            style = "o-" if contender == "superpipeline" else "s"
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=contender)
        _floor_curve(axes, own)
        axes.set(title=workload, xlabel="weights on the device / all weights", yscale="log")
        axes.set(ylabel="milliseconds a step", xlim=(0, 1.1))
        axes.legend(fontsize=6)
    return _saved(figure, path)


def _point(row: Row) -> tuple[float, float]:
    held = row.get("weight bytes") or row.get("measured weight bytes") or row["budget bytes"]
    return held / row["weights"], row["ms"]


def _floor_curve(axes: Axes, rows: list[Row]) -> None:
    points = sorted(
        (_point(r)[0], r["floor ms"]) for r in rows if r.get("floor ms") and is_streamed(r)
    )
    if points:
        axes.plot(*zip(*points, strict=True), color="black", linewidth=1, label="floor")


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
