"""Fetches a model's files from the Hugging Face hub into the hub's own cache, and no others.

A repository often holds the same weights several times: in other precisions, as pickle, for other
frameworks. So the small files come first, which say what large ones are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from superpipeline.errors import InputError
from superpipeline.notices import say

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Configurations, tokenizers, and code (which runs only where trust_remote_code=True).
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


class Repository:
    """One folder of one commit of a repository. Without a network: as much of it as was cached.

    Attributes:
        folder: in the cache; the small files are there from the start.
        names: of all files, relative to the folder, whether they are in the cache or not.

    Raises:
        InputError: huggingface_hub is not installed, no such repository or revision, no access.
    """

    def __init__(
        self, name: str, revision: str | None, subfolder: str | None, *, quiet: bool
    ) -> None:
        self._name, self._revision, self._quiet = name, revision, quiet
        self._prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        if not quiet:  # it may have been meant as a folder, and the hub may be slow to answer
            say(f"there is no folder {name} here; looking for it on the hub")
        root = self._fetch(_SMALL)
        self._revision = root.name  # from here on the same commit, whatever is pushed meanwhile
        self.folder = root / self._prefix
        names = (name for name in self._list(root) if name.startswith(self._prefix))
        self.names = frozenset(name.removeprefix(self._prefix) for name in names)

    def get(self, names: Iterable[str]) -> None:
        """Downloads those of these files that are not in the cache."""
        self._fetch(names)

    def _fetch(self, names: Iterable[str]) -> Path:
        with _explained(self._name, self._revision):
            from huggingface_hub import snapshot_download

            patterns = [self._prefix + name for name in names]
            with _bars(quiet=self._quiet):
                folder = snapshot_download(
                    self._name, revision=self._revision, allow_patterns=patterns
                )
        return Path(folder)

    def _list(self, root: Path) -> list[str]:
        import httpx
        from huggingface_hub import list_repo_files

        try:
            return list_repo_files(self._name, revision=self._revision)
        except (OSError, httpx.HTTPError):  # no network: what the cache holds
            files = (path for path in root.rglob("*") if path.is_file())
            return [path.relative_to(root).as_posix() for path in files]


@contextmanager
def _bars(*, quiet: bool) -> Iterator[None]:
    """The hub's own progress bars, or none."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as one line that says what to do."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise InputError(
            f"{name} is no folder here, and to get it from the hub takes huggingface_hub: "
            f"pip install 'superpipeline[hub]'"
        ) from error
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} is only for those who accepted its conditions: do so on its page on the hub, "
            f"then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder {name} here and no public model {name} on the hub; if it is "
            f"private, run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r} on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"there is no folder {name} here, the hub's cache does not hold it, and the hub cannot "
            f"be reached"
        ) from error
