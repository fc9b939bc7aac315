"""Mutants: the package with one ordering call taken out. Listed from the source, never by hand.

Sites are calls that order, known by the name of what is called and of whom it is asked:

    of streams        record, wait, join, synchronize_event
    of the engine     whose turn it is, in forwards and backwards; which stream computes; what is
                      waited for before a fetch
    of graph nodes    register_prehook
    of activations    bringing back what is on the host, and letting go of it
    of updates        whatever waits for pending ones; an update's done.wait

A mutant of a record gives an event that lies in the past, which is what recording too early comes
to; a mutant of any other call does nothing. `streams.py` itself, which has the streams, is left
out, and so is whatever else only carries copies out.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import superpipeline

SOURCE = Path(superpipeline.__file__).parent
# They are below the streams, and their waits are for the disk: of tests of their own.
CARRIERS = {"streams.py", "staging.py", "reader.py", "ring.py"}
ORDERING = {
    "streams": {"record", "wait", "join", "synchronize_event"},
    "engine": {"follow_stream", "take_turn", "bring", "begin_backward", "end_backward"},
    "turns": {"take_turn", "end_call", "begin_pass", "end_pass"},
    "self": {"follow_stream", "before_fetch", "bring", "finish"},
    "node": {"register_prehook"},
    "activations": {"end_backward"},
    "offload": {"bring", "end_backward"},
    "updates": {"wait_for", "begin_pass", "finish", "wait_for_parameters", "wait_for_borrowers"},
    "done": {"wait"},
}


class Mutant(NamedTuple):
    """One ordering call, `number` in the function `owner.method` (or `method`) of a module."""

    module: str
    owner: str
    method: str
    number: int
    text: str

    @property
    def name(self) -> str:
        return ".".join(filter(None, (self.module, self.owner, self.method))) + f": {self.text}"

    def install(self, monkeypatch: Any) -> None:
        """Changes the function, wherever it was handed to, for as long as `monkeypatch` lasts."""
        module = importlib.import_module(f"superpipeline.{self.module}")
        before = _function(getattr(module, self.owner) if self.owner else module, self.method)
        tree = ast.parse(textwrap.dedent(inspect.getsource(before)))
        site = list(sites(tree))[self.number]
        mutated = ast.fix_missing_locations(_Replace(site).visit(tree))
        namespace: dict[str, Any] = {}
        exec(compile(mutated, f"<mutant of {self.method}>", "exec"), vars(module), namespace)
        after = _function(SimpleNamespace(**namespace), self.method)
        monkeypatch.setattr(before, "__code__", after.__code__)


def _function(owner: Any, name: str) -> Any:
    """The function itself, under a property or decorators."""
    found = inspect.getattr_static(owner, name)
    return inspect.unwrap(found.fget if isinstance(found, property) else found)


def sites(tree: ast.AST) -> Iterator[ast.Call]:
    """Ordering calls, in the order of the source."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        receiver = node.func.value
        name = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", "")
        if node.func.attr in ORDERING.get(name.lstrip("_"), ()):
            yield node


def all_mutants() -> list[Mutant]:
    """Every mutant of the package."""
    found: list[Mutant] = []
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name in CARRIERS:
            continue
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        listed = [
            Mutant(module, owner, function.name, number, ast.unparse(site))
            for owner, function in _functions(tree)
            for number, site in enumerate(sites(function))
        ]
        assert len(listed) == len(list(sites(tree))), f"an ordering call in no function of {path}"
        found += listed
    return found


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Methods of classes, with these, and functions of the module."""
    for owner in tree.body:
        if isinstance(owner, ast.FunctionDef):
            yield "", owner
        elif isinstance(owner, ast.ClassDef):
            for method in owner.body:
                if isinstance(method, ast.FunctionDef):
                    yield owner.name, method


class _Replace(ast.NodeTransformer):
    def __init__(self, site: ast.Call) -> None:
        self._site = site

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if node is not self._site:
            return self.generic_visit(node)
        assert isinstance(node.func, ast.Attribute)
        if node.func.attr != "record":  # the arguments are still worked out
            return ast.Tuple(elts=node.args, ctx=ast.Load())
        past = copy.deepcopy(node.func)
        past.attr = "past_event"
        return ast.Call(func=past, args=[], keywords=[])
