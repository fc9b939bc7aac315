"""What a process has resident, measured: run by tests in processes of their own."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import superpipeline
from superpipeline.host import return_freed_memory
from superpipeline.resume import load_checkpoint, save_checkpoint


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def settled() -> int:
    """Bytes resident now, after what was freed has gone back to the system."""
    gc.collect()
    return_freed_memory()
    return _status("VmRSS")


def peak_of(call: Callable[[], Any]) -> int:
    """By how much resident memory grows at most while `call` runs."""
    before = settled()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    return _status("VmHWM") - before


# ---- saving and loading -------------------------------------------------------------------------


def _wide(num_layers: int, **options: Any) -> nn.Module:
    return nn.Sequential(*[nn.Linear(1024, 2048, **options) for _ in range(num_layers)])


def save_and_load() -> None:
    """Prints the bytes of model and optimizer, and the peaks of saving and loading them."""
    with tempfile.TemporaryDirectory() as name:
        tiny = nn.Linear(2, 2)
        _saved(Path(name) / "tiny", tiny, _stepped(tiny))  # what is imported on the way
        model = superpipeline.stream(_wide(16), "50%", device="cpu", quiet=True)
        optimizer = _stepped(model)
        run = Path(name) / "run"
        found = {
            "model": sum(p.nbytes for p in model.parameters()),
            "state": sum(t.nbytes for s in optimizer.state.values() for t in s.values()),
            "save": peak_of(lambda: _saved(run, model, optimizer)),
            "load weights": peak_of(lambda: load_checkpoint(run, model)),
        }
        optimizer.state.clear()
        fresh = torch.optim.AdamW(model.parameters())
        found["load all"] = peak_of(lambda: load_checkpoint(run, model, optimizer=fresh))
        found["load again"] = peak_of(lambda: load_checkpoint(run, model, optimizer=fresh))
        print(json.dumps(found))


def _stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _saved(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    save_checkpoint(folder, model, optimizer=optimizer, step=1)


# ---- training -----------------------------------------------------------------------------------


class Frozen(nn.Module):
    """Layers that do not train, in bfloat16, and an adapter that does."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        layers = [nn.Linear(1024, 1024, bias=False) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers).to(torch.bfloat16).requires_grad_(False)
        self.adapter = nn.Linear(1024, 8, bias=False).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.adapter(x) @ self.adapter.weight
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def _trained(num_layers: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(num_layers)])


def bytes_per_parameter(kind: str, *, lazy: bool = False) -> None:
    """Prints what four steps have resident at their peak for each parameter, but for the device's
    share: on the CPU the window and the residents are host memory as well."""
    _train(_streamed(kind, 2), kind, lazy=lazy)  # thread pools, and what is imported on the way
    before = settled()
    model = _streamed(kind, 32)
    settled()
    Path("/proc/self/clear_refs").write_text("5")
    _train(model, kind, lazy=lazy)
    peak = _status("VmHWM") - before
    handle = superpipeline.handle(model)
    assert handle.stats().streamed_bytes > 0
    count = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"peak": (peak - handle.plan.device_bytes) / count}))


def _streamed(kind: str, num_layers: int) -> nn.Module:
    model: nn.Module = Frozen(num_layers) if kind == "frozen" else _trained(num_layers)
    options = {"param_dtype": torch.bfloat16} if kind == "bfloat16" else {}
    return superpipeline.stream(model, k=2, device="cpu", quiet=True, **options)


def _train(model: nn.Module, kind: str, *, lazy: bool) -> None:
    handle = superpipeline.handle(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    if lazy:
        optimizer = handle.optimizer(optimizer)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(4, 1024, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
    with handle.weights():
        pass
