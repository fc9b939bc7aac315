"""What every benchmark keeps beside its figures: device, date, versions, command."""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import superpipeline

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Where and with what a figure was obtained."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": device or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "superpipeline": superpipeline.__version__,
        **{name: _version(name) for name in ("transformers", "diffusers", "accelerate")},
        "command": f"python -m {_module()} {' '.join(sys.argv[1:])}".strip(),
    }


def save(name: str, figures: Any, folder: Path | None = None) -> Path:
    """Writes `figures` with their environment to results/NAME.json and returns the path."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "figures": figures}, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """`rows` as aligned text; columns are the keys of the first row."""
    columns = list(rows[0])
    cells = [columns, *[[_short(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


def _short(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec is not None else sys.argv[0]


def _version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
