"""What holds the package in shape: layers, pure modules, file lengths, docstrings, examples."""

import ast
import doctest
import importlib
import sys
from pathlib import Path

import pytest
import torch

import superpipeline

PACKAGE = Path(superpipeline.__file__).parent
# From low to high: a module may import only those before it.
LAYERS = [
    "errors", "sizes", "notices", "progress", "cgroup", "plan", "simulate", "residency",
    "placing", "planner", "order", "tiers", "pagemap", "advice", "header", "disk", "computed",
    "ring", "worker", "reader", "paged", "staging", "streams", "stopwatch", "cpu_streams",
    "devices", "weights", "blocks", "host", "ready", "ondisk", "standins", "trace", "edits",
    "late", "clip", "window", "pointers", "states", "outputs", "saved", "casts", "gradients",
    "sums", "masters", "engine", "stash", "offload", "recompute", "backward", "discovery",
    "calls", "explain", "options", "activations", "passes", "build", "pack", "profile",
    "verify", "siblings", "updates", "optimizer", "assembly", "pipeline", "api", "tensorfile",
    "versions", "resume", "recipes", "reserved", "gather", "hub", "checkpoint", "assign",
    "from_transformers", "from_diffusers", "load", "cli",
]  # fmt: skip
PURE = ["plan", "planner", "residency", "placing", "simulate", "sizes", "errors", "order", "tiers"]
# A plan prints its schedule, which only playing it gives. The import is inside the functions.
UPWARD = {("plan", "simulate")}
LONGEST_FILE = 400

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def layer_of(path):
    """A module's layer: a subpackage is one, and the package's two entry files are above all."""
    return name_of(path).split(".")[0]


def guards_types(node):
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def imports_of(tree):
    """(imported name, whether inside a function) of all imports that happen at runtime."""
    found = []

    def walk(node, inside):
        if guards_types(node):
            for other in node.orelse:
                walk(other, inside)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ("superpipeline." if node.level else "") + (node.module or "")
            module = module.rstrip(".")
            found.append((module, inside))
            found.extend((f"{module}.{alias.name}", inside) for alias in node.names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(tree, False)
    return found


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def layers_imported(tree):
    """(layer, whether inside a function) of the package's own modules among the imports."""
    names = [(name.split("."), inside) for name, inside in imports_of(tree)]
    return {
        (parts[1], inside)
        for parts, inside in names
        if parts[0] == "superpipeline" and len(parts) > 1 and parts[1] in LAYERS
    }


def test_every_module_has_its_layer():
    missing = {layer_of(path) for path in FILES} - {*LAYERS, "__init__", "__main__"}
    assert not missing, f"say in LAYERS where these belong: {missing}"
    assert len(set(LAYERS)) == len(LAYERS)
    assert set(LAYERS) <= {layer_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    own = layer_of(path)
    if own not in LAYERS:
        return  # __init__ and __main__ are above all
    for other, inside in sorted(layers_imported(parse(path))):
        if other == own or (inside and (own, other) in UPWARD):
            continue
        assert LAYERS.index(other) < LAYERS.index(own), f"{own} imports {other}, which is higher"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_the_package_itself(path):
    """`from superpipeline import x` would go through the public names, above every layer."""
    if layer_of(path) in {"cli", "__init__", "__main__"}:
        return
    modules = {layer_of(other) for other in FILES}
    for name, _ in imports_of(parse(path)):
        parts = name.split(".")
        if parts[0] == "superpipeline" and len(parts) == 2:
            assert parts[1] in modules, f"{name} is a public name, not a module"


@pytest.mark.parametrize("name", PURE)
def test_planning_needs_no_torch(name):
    """Only the standard library and one another, so nothing that imports torch in turn."""
    for imported, _ in imports_of(parse(PACKAGE / f"{name}.py")):
        first, *rest = imported.split(".")
        if first == "superpipeline":
            assert rest, f"{name} imports the package, and torch with it"
            assert rest[0] in PURE, f"{name} imports {imported}"
        else:
            assert first in sys.stdlib_module_names, f"{name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_too_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines: more than one idea?"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_public_says_what_it_is(path):
    tree = parse(path)
    if tree.body:
        assert ast.get_docstring(tree), "the file does not open with the sentence that says it"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not silent, f"no docstring: {silent}"


def test_every_public_name_is_there():
    for name in superpipeline.__all__:
        assert getattr(superpipeline, name) is not None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_examples_run(path):
    if path.name == "__main__.py":
        return  # importing it runs the command line
    name = name_of(path)
    module = importlib.import_module(
        "superpipeline" if name == "__init__" else f"superpipeline.{name}"
    )
    globs = {**vars(module), "superpipeline": superpipeline, "torch": torch}
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=globs):
        lines: list[str] = []
        results = doctest.DocTestRunner().run(test, out=lines.append)
        assert results.failed == 0, "".join(lines)


def test_there_are_examples():
    written = sum(path.read_text(encoding="utf-8").count(">>> ") for path in FILES)
    assert written >= 10
