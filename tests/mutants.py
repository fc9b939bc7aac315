"""Mutants: the package with one ordering call taken out. Listed from the source, never by hand.

Sites are all calls of `record`, `wait` and `join` on streams, outside `streams.py`, which has
them. A mutant of a wait or join does nothing; a mutant of a record gives an event that lies in the
past, which is what recording too early comes to.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import superpipeline

SOURCE = Path(superpipeline.__file__).parent
ORDERING = {"record", "wait", "join"}


class Mutant(NamedTuple):
    """One ordering call, `number` in the method `owner.method` of a module."""

    module: str
    owner: str
    method: str
    number: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.owner}.{self.method}: {self.text}"

    def install(self, monkeypatch: Any) -> None:
        """Replaces the method for as long as `monkeypatch` lasts."""
        module = importlib.import_module(f"superpipeline.{self.module}")
        owner = getattr(module, self.owner)
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(owner, self.method))))
        site = list(sites(tree))[self.number]
        mutated = ast.fix_missing_locations(_Replace(site).visit(tree))
        namespace: dict[str, Any] = {}
        exec(compile(mutated, f"<mutant of {self.method}>", "exec"), vars(module), namespace)
        monkeypatch.setattr(owner, self.method, namespace[self.method])


def sites(tree: ast.AST) -> Iterator[ast.Call]:
    """Ordering calls whose receiver is named `streams`, in the order of the source."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        receiver = node.func.value
        name = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", "")
        if node.func.attr in ORDERING and name.lstrip("_") == "streams":
            yield node


def all_mutants() -> list[Mutant]:
    """Every mutant of the package."""
    found: list[Mutant] = []
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name == "streams.py":
            continue
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        methods = [
            (owner, method)
            for owner in ast.walk(tree)
            if isinstance(owner, ast.ClassDef)
            for method in owner.body
            if isinstance(method, ast.FunctionDef)
        ]
        listed = [
            Mutant(module, owner.name, method.name, number, ast.unparse(site))
            for owner, method in methods
            for number, site in enumerate(sites(method))
        ]
        assert len(listed) == len(list(sites(tree))), f"an ordering call outside a method in {path}"
        found += listed
    return found


class _Replace(ast.NodeTransformer):
    def __init__(self, site: ast.Call) -> None:
        self._site = site

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if node is not self._site:
            return self.generic_visit(node)
        assert isinstance(node.func, ast.Attribute)
        if node.func.attr != "record":
            return ast.copy_location(ast.Constant(None), node)
        past = copy.deepcopy(node.func)
        past.attr = "past_event"
        return ast.Call(func=past, args=[], keywords=[])
