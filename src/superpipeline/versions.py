"""A folder whose files change all at once: an index names them, and one rename replaces the index.

    folder/
        model.safetensors.index.json     names the files of the version that counts
        model-<tag>.safetensors          each version has a tag of its own,
        state-<tag>.pt                   so a new one never writes to a file that counts

    write   *-<tag>.unfinished ──> fsync ──> rename ──> fsync of the folder
            index.unfinished   ──> fsync ──> rename over the index ──> fsync of the folder
            then the files of the version before are removed

[Note: killed at any moment]
    Until the last rename the index is the old one and names the old files, all of which are there.
    From then on it names the new ones, which are whole and on the disk. A file that no index names
    is left from a version that was never finished, or just replaced; the next write removes it.

The index is what transformers writes for a model in several files, so whoever reads those can read
the weights.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from superpipeline.errors import DiskError, InputError

INDEX = "model.safetensors.index.json"
_KEY = "superpipeline"
_UNFINISHED = ".unfinished"
# What a version's files are called, and nothing that anybody else would call theirs.
_OURS = re.compile(
    rf"(model|state(\.\w+)?)-[0-9a-f]{{16}}\.(safetensors|pt)({_UNFINISHED})?"
    rf"|{re.escape(INDEX + _UNFINISHED)}"
)


class Draft:
    """A version that is being written. Made by `replacing`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tag = secrets.token_hex(8)
        self._files: dict[str, str] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """The version's file `name`, such as "state.pt", to be written and read."""
        stem, suffix = name.rsplit(".", 1)
        self._files[name] = f"{stem}-{self._tag}.{suffix}"
        with (self.folder / (self._files[name] + _UNFINISHED)).open("xb+") as file:
            yield file
            _to_disk(file)

    def commit(self, tensors: Mapping[str, int], about: Any) -> None:
        """The version counts from now on, with these tensors (name: bytes) and this about it."""
        for name in self._files.values():
            (self.folder / (name + _UNFINISHED)).rename(self.folder / name)
        _folder_to_disk(self.folder)
        model = self._files["model.safetensors"]
        index = {
            "metadata": {
                "total_size": sum(tensors.values()),
                _KEY: {"files": self._files, "about": about},
            },
            "weight_map": dict.fromkeys(tensors, model),
        }
        path = self.folder / (INDEX + _UNFINISHED)
        with path.open("wb") as file:
            file.write(json.dumps(index, indent=1).encode())
            _to_disk(file)
        path.replace(self.folder / INDEX)
        _folder_to_disk(self.folder)


@contextmanager
def replacing(folder: Path) -> Iterator[Draft]:
    """Gives a new version to write and `commit`; what the folder held before counts until then.

    Costs the disk both versions at once. One process at a time may write to a folder.

    Raises:
        DiskError: the system refused; the folder's version is the one before.
        InputError: the folder holds a model of somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = _named(_read_index(folder))
        _remove_others(folder, kept)
        try:
            yield Draft(folder)
        finally:
            _remove_others(folder, _named(_read_index(folder)))
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        raise DiskError(
            f"{folder} could not be written: {error.strerror or error}; what it held before is "
            f"still there"
        ) from error


class Version(NamedTuple):
    """A version that is open for reading, whatever becomes of the folder meanwhile.

    Attributes:
        files: by name, such as "state.pt".
        about: as given to `commit`.
    """

    folder: Path
    files: dict[str, BinaryIO]
    about: Any


@contextmanager
def reading(folder: Path) -> Iterator[Version]:
    """The version that counts.

    Raises:
        InputError: there is none.
        DiskError: a file is missing, or cannot be opened.
    """
    with ExitStack() as stack:
        yield _open(folder, stack)


def _open(folder: Path, stack: ExitStack) -> Version:
    index = _read_index(folder)
    if index is None:
        raise InputError(
            f"{folder} holds no checkpoint; save one with superpipeline.save_checkpoint(...)"
        )
    opened: dict[str, BinaryIO] = {}
    try:
        for name, file in index["files"].items():
            opened[name] = stack.enter_context((folder / file).open("rb", buffering=0))
    except FileNotFoundError as error:
        if _read_index(folder) != index:  # replaced meanwhile
            return _open(folder, stack)
        raise DiskError(f"{folder / INDEX} names {error.filename}, which is not there") from error
    except OSError as error:
        raise DiskError(f"{error.filename} cannot be opened: {error.strerror}") from error
    return Version(folder, opened, index["about"])


def _read_index(folder: Path) -> dict[str, Any] | None:
    """What we wrote into the index; None where there is none."""
    path = folder / INDEX
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        text = b""
    if not text and not (folder / "model.safetensors").exists():
        return None
    found = _ours(text)
    if found is None:
        raise InputError(
            f"{folder} holds a model that save_checkpoint did not write; give a folder of its own"
        )
    return found


def _ours(text: bytes) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(text)["metadata"][_KEY]
        names = [*found["files"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if all(_OURS.fullmatch(name) for name in names) else None


def _named(index: dict[str, Any] | None) -> set[str]:
    return set() if index is None else set(index["files"].values())


def _remove_others(folder: Path, kept: set[str]) -> None:
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Its names; a system that cannot open folders (Windows) writes them by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
