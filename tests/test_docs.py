"""The documents are true: examples run, quoted messages and named files exist, figures agree."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from superpipeline.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "superpipeline"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README, RESTRICTIONS = ROOT / "README.md", ROOT / "docs" / "restrictions.md"
MODEL = "demo/SmolLM2-135M-Instruct"  # the examples' model: here a tiny one in its place
REFUSALS = {"UnsupportedError", "BackwardError", "ClosedError", "HostMemoryError"}
NOTICES = {"warn", "add_note", "say_once"}
SPOKEN = "superpipeline: "


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(path: Path, language: str) -> list[str]:
    """The contents of the document's code blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def prose(path: Path) -> str:
    """The document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tmp_path, folder, monkeypatch) -> Path:
    """A working directory in which the examples find a (tiny) model."""
    place = tmp_path / MODEL
    place.parent.mkdir(parents=True)
    place.symlink_to(folder)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if fenced(path, "python")], ids=name_of
)
def test_python_examples_run(path, here, capsys):
    """In order, in one namespace; `# -> text` at the end of an example is what it prints."""
    module = types.ModuleType("example")
    for number, code in enumerate(fenced(path, "python")):
        exec(compile(code, f"{name_of(path)}, example {number + 1}", "exec"), vars(module))
        printed = capsys.readouterr().out.splitlines()
        expected = re.findall(r"^# -> (.*)$", code, re.MULTILINE)
        assert not expected or printed == expected
        assert "print(" not in code or printed


def commands() -> Iterator[tuple[str, str]]:
    """Each command line of the documents' shell examples, comments taken off."""
    for path in DOCUMENTS:
        for block in fenced(path, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield name_of(path), shlex.join(words)


@pytest.mark.parametrize(("document", "line"), sorted(set(commands())))
def test_command_line_examples_run(document, line, here):
    program, *arguments = shlex.split(line)
    if program == "superpipeline":
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert ("--verify" in arguments) == ("verified: " in result.stdout)
        if "--json" in arguments:
            assert json.loads(Path("figures.json").read_text())["streamed_bytes"] > 0
    elif program == "make":
        assert arguments[0] in make_targets()
    else:
        assert line.startswith(("pip install -e ", "python examples/")), f"who tests {line!r}?"


@pytest.mark.parametrize("with_folder", [True, False])
def test_text_generation(with_folder, here, capsys):
    """With the demo's folder, and without it."""
    if not with_folder:
        (here / MODEL).unlink()
    runpy.run_path("examples/text_generation.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"^answer: .", printed, re.MULTILINE)
    assert re.search(
        r"^verified: \d+ tensors bit-equal to the plain model's", printed, re.MULTILINE
    )


# --- what is named exists ------------------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_named_make_targets_exist(path):
    named = re.findall(r"`make ([a-z-]+)[^`]*`", prose(path))
    assert set(named) <= make_targets()


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_named_source_files_exist():
    names = {
        name
        for path in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "how-it-works.md")
        for name in re.findall(r"`([a-z_]+\.py)`", prose(path))
    } - {"utils.py"}  # named as what there is none of
    assert len(names) > 15
    assert all((SOURCE / name).exists() for name in names), names


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


# --- messages ------------------------------------------------------------------------------------


def normal(text: str) -> str:
    """`text` with every placeholder as {} and every run of white space as one space."""
    return " ".join(re.sub(r"\{[^{}]*\}", "{}", text).split())


def literal(node: ast.AST | None) -> str | None:
    """The normal text of a string or f-string; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return normal(node.value)
    if isinstance(node, ast.JoinedStr):
        pieces = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
        return normal("".join(str(piece) for piece in pieces))
    return None


def source_texts() -> set[str]:
    """Every text in the package's code."""
    nodes = (n for path in SOURCE.rglob("*.py") for n in ast.walk(ast.parse(path.read_text())))
    return {text for node in nodes if (text := literal(node))}


def announcements() -> Iterator[tuple[str, str]]:
    """Where the library refuses, warns or notes, and the text there."""
    for path in sorted(SOURCE.glob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            target.id: literal(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            kind = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            kind = node.func.id if isinstance(node.func, ast.Name) else kind
            if kind in REFUSALS | NOTICES and path.name != "notices.py":
                said = text_of(node.args[0], constants)
                said = SPOKEN + said if kind == "warn" else said  # notices.py puts it in front
                yield f"{path.name}:{node.lineno} {kind}", said


def text_of(node: ast.AST, constants: dict[str, str | None]) -> str:
    """The text of a literal, or of TEXT.format(...) where TEXT is a constant of the file."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        assert node.func.attr == "format"
        assert isinstance(node.func.value, ast.Name)
        text = constants[node.func.value.id]
    else:
        text = literal(node)
    assert text, "write the message where it is raised: the documents quote it"
    return text


def test_quoted_messages_are_in_the_code():
    texts = source_texts()
    quotes = [normal(quote) for quote in fenced(RESTRICTIONS, "text")]
    assert len(quotes) > 25
    said = [quote.removeprefix(SPOKEN) for quote in quotes]
    missing = [quote for quote in said if not any(quote in text for text in texts)]
    assert not missing


def test_every_refusal_and_warning_is_quoted():
    quotes = {normal(quote) for quote in fenced(RESTRICTIONS, "text")}
    found = list(announcements())
    assert len(found) > 15
    missing = [f"{where}: {text}" for where, text in found if text not in quotes]
    assert not missing


# --- figures -------------------------------------------------------------------------------------


def test_counts_are_those_of_the_tests():
    from test_equality import BOUNDS
    from zoo import CASE_CALLS, CASES

    text = README.read_text()
    assert f"zoo of {len(CASES)} architectures with {len(CASE_CALLS)} calls" in text
    assert f"zoo of {len(CASES)} architectures" in (ROOT / "CHANGELOG.md").read_text()
    assert len(BOUNDS) == 5
    assert "at five bounds" in text


def test_disk_figures_are_those_of_the_results():
    from benchmarks.cpu_disk.tables import text

    document = (ROOT / "docs" / "larger-than-memory.md").read_text()
    begin, end = "<!-- cpu_disk: begin -->", "<!-- cpu_disk: end -->"
    written = document.partition(begin)[2].partition(end)[0].strip()
    measured = text()
    assert written == measured or (not measured and written.startswith("Not measured yet"))


def test_visit_cost_is_that_of_the_results():
    kept = json.loads((ROOT / "benchmarks" / "results" / "visit-cost.json").read_text())
    visit, setup = kept["figures"]
    begin, end = "<!-- measured: begin -->", "<!-- measured: end -->"
    measured = README.read_text().partition(begin)[2].partition(end)[0]
    assert f"| {visit['visit us']:.1f} µs |" in measured
    assert f"| {setup['stream() s']:.2f} s |" in measured
    environment = kept["environment"]
    for name in ("date", "device", "torch", "command"):
        assert str(environment[name]) in measured, name
