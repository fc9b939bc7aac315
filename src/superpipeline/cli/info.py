"""`superpipeline info`: what a bug report, or a choice of bytes, needs to know of this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import psutil
import torch
import typer

from superpipeline import cgroup, profile
from superpipeline.sizes import format_bytes

NO_LIMIT_BYTES = 1 << 60


def info() -> None:
    """Print versions, devices, memory, link rates and limits, fit to paste in a bug report."""
    facts = [*_versions(), *_devices(), *_host()]
    width = max(len(name) for name, _ in facts)
    # Plain lines, not a rich table: a pasted report must not be wrapped or framed.
    for name, value in facts:
        typer.echo(f"{name:<{width}}  {value}")


def _versions() -> list[tuple[str, str]]:
    return [
        ("superpipeline", _version("superpipeline")),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("torch", torch.__version__),
        ("cuda", torch.version.cuda or "none: this torch was built without it"),
        ("transformers", _version("transformers")),
        ("os", platform.platform() + (" (WSL)" if is_wsl() else "")),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        cpu = torch.device("cpu")
        return [
            ("device", f"cpu, {torch.get_num_threads()} threads (no accelerator found)"),
            ("link rate", _link_rate(cpu)),
        ]
    facts = []
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        facts += [
            ("device", f"{device} {_device_name(device)}, {_device_memory(device)}"),
            ("link rate", _link_rate(device)),
        ]
    return facts


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _device_memory(device: torch.device) -> str:
    try:
        free_bytes, total_bytes = torch.accelerator.get_memory_info(device)
    except (RuntimeError, AttributeError):
        # Not every backend can tell, and torch before 2.10 does not ask.
        return "memory unknown"
    return f"{format_bytes(free_bytes)} free of {format_bytes(total_bytes)}"


def _link_rate(device: torch.device) -> str:
    try:
        rate = profile.link_rate(device)
    except RuntimeError as error:
        # A full or broken device is what bug reports are about: the rest must still print.
        return f"not measured: {str(error).splitlines()[0]}"
    return f"{rate / 1e9:.1f} GB/s host to {device.type}"


def _host() -> list[tuple[str, str]]:
    memory = psutil.virtual_memory()
    # A container's limit is what gets a process killed, and host RAM does not show it.
    limit_bytes = min((group.limit_bytes for group in cgroup.groups()), default=None)
    return [
        ("host RAM", f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"),
        ("cgroup limit", "none" if limit_bytes is None else format_bytes(limit_bytes)),
        ("pinned memory", _pinned_limits()),
    ]


def is_wsl() -> bool:
    """Whether this Linux is one that Windows runs; there, pinned memory is scarce."""
    return "microsoft" in platform.release().lower()


def _pinned_limits() -> str:
    note = "; WSL: Windows caps it, often at half of the RAM" if is_wsl() else ""
    if sys.platform == "win32":
        return "no RLIMIT_MEMLOCK on this system"
    import resource

    soft_bytes, hard_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return f"RLIMIT_MEMLOCK soft {_limit(soft_bytes)}, hard {_limit(hard_bytes)}{note}"


def _limit(num_bytes: int) -> str:
    # RLIM_INFINITY is -1 on Linux and a huge number elsewhere.
    return "unlimited" if not 0 <= num_bytes < NO_LIMIT_BYTES else format_bytes(num_bytes)
