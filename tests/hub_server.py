"""A hub of one's own: the few requests that huggingface_hub makes, answered from a folder.

<root>/<owner>/<name>/...   the files of a repository, all at one commit
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c0ffee" + 34 * "0"
REVISIONS = ("main", COMMIT)


class _Server(ThreadingHTTPServer):
    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.got: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""

    def _answer(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if self.command == "GET":
            self.server.got.append(path)
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:  # /api/models/OWNER/NAME/tree or revision/REVISION
            self._describe(self.server.root / parts[2] / parts[3], parts[4], parts[5])
        else:  # /OWNER/NAME/resolve/REVISION/FILE
            self._file(self.server.root / parts[0] / parts[1], parts[3], "/".join(parts[4:]))

    def _describe(self, repository: Path, what: str, revision: str) -> None:
        if not repository.is_dir():
            self._refuse("RepoNotFound")
        elif revision not in REVISIONS:
            self._refuse("RevisionNotFound")
        else:
            paths = sorted(path for path in repository.rglob("*") if path.is_file())
            files = {path.relative_to(repository).as_posix(): path for path in paths}
            self._send(json.dumps(_tree(files) if what == "tree" else _commit(files)).encode())

    def _file(self, repository: Path, revision: str, name: str) -> None:
        path = repository / name
        if not path.is_file() or revision not in REVISIONS:
            self._refuse("EntryNotFound")
            return
        self._send(path.read_bytes(), **{"ETag": f'"{_tag(path)}"', "X-Repo-Commit": COMMIT})

    def _send(self, content: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _tree(files: dict[str, Path]) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": name, "size": path.stat().st_size, "oid": _tag(path)}
        for name, path in files.items()
    ]


def _commit(files: dict[str, Path]) -> dict[str, object]:
    return {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}


def _tag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def hub_server(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves `root`; gives the address, and a list to which every path that is got is appended."""
    server = _Server(root)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
