"""The memory limits of this process's control groups (Linux, versions 1 and 2).

In a container it is these that get a process killed, and the system's free memory does not show
them. A group's page cache counts as free here: it is given up under pressure.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version 1 writes "no limit" as a number near 2**63.
_NO_LIMIT_BYTES = 1 << 60


class Group(NamedTuple):
    """One control group that has a limit.

    Attributes:
        cache_bytes: what of its used bytes is page cache.
    """

    limit_bytes: int
    used_bytes: int
    cache_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes + self.cache_bytes)


def groups(root: Path = ROOT, membership: Path = MEMBERSHIP) -> list[Group]:
    """Every group with a limit, from this process's own up to the root."""
    found = (_read(folder, version) for folder, version in _folders(root, membership))
    return [group for group in found if group is not None]


def _folders(root: Path, membership: Path) -> Iterator[tuple[Path, int]]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                yield folder, 1 if controllers else 2


def _read(folder: Path, version: int) -> Group | None:
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    try:
        limit_bytes = int((folder / limit).read_text())  # "max" is no number, and no limit
        used_bytes = int((folder / used).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    cache = stat.get("total_cache", stat.get("file", 0))
    cache -= stat.get("total_shmem", stat.get("shmem", 0))
    return Group(limit_bytes, used_bytes, cache) if limit_bytes < _NO_LIMIT_BYTES else None
