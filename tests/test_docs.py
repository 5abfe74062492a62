"""The examples of README and of every docstring run, and print what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import hfcore

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "hfcore"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line number, source) of each fenced block whose language is exactly `python`."""
    fence = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start()) + 2, m.group(1)) for m in fence.finditer(text)]


def docstrings(path: Path) -> list[tuple[str, int, str]]:
    """(name, line, docstring) of the module and of everything in it that has an example."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        doc = ast.get_docstring(node) if isinstance(node, kinds) else None
        if doc and ">>>" in doc:
            found.append((getattr(node, "name", path.stem), getattr(node, "lineno", 1), doc))
    return found


EXAMPLES = [
    pytest.param(path, *entry, id=f"{path.name}:{entry[0]}")
    for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*.pyi")])
    for entry in docstrings(path)
]


@pytest.fixture
def demo_directory(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Examples run in a directory of their own, where the demo model is `model.gguf`."""
    (tmp_path / "model.gguf").symlink_to(smollm2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks() -> dict[str, Any]:
    """README's blocks, one after the other; the names that they leave behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks, "README.md shows no python"
    for line, source in blocks:
        # The blank lines make a traceback point at the line of the document.
        exec(compile("\n" * (line - 1) + source, "README.md", "exec"), names)  # noqa: S102 - our own text
    return names


def test_the_examples_of_the_readme_run_and_its_agent_calls_a_tool_then_answers(
    demo_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = run_blocks()
    question, *calls_and_results, answer = readme["conversation"]
    kinds = [message.type for message in (question, *calls_and_results, answer)]
    assert kinds[:3] == ["human", "AIMessageChunk", "tool"]
    assert kinds[-1] == "AIMessageChunk"
    for called, result in zip(calls_and_results[::2], calls_and_results[1::2], strict=True):
        [call] = called.tool_calls
        assert (called.invalid_tool_calls, result.tool_call_id) == ([], call["id"])
        assert result.content == str(readme["tools"][call["name"]].invoke(call["args"]))
    assert (answer.tool_calls, answer.invalid_tool_calls) == ([], [])
    assert answer.content
    assert answer.content in capsys.readouterr().out


@pytest.mark.parametrize(("path", "name", "line", "doc"), EXAMPLES)
def test_the_example_of_a_docstring_prints_what_it_says(
    path: Path, name: str, line: int, doc: str, request: pytest.FixtureRequest
) -> None:
    if "model.gguf" in doc:
        request.getfixturevalue("demo_directory")
    stem = path.stem
    module = importlib.import_module("hfcore" if stem == "__init__" else f"hfcore.{stem}")
    test = doctest.DocTestParser().get_doctest(
        doc, {**vars(hfcore), **vars(module)}, name, str(path), line
    )
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert result.failed == 0, "".join(said)


def test_only_blocks_marked_python_are_run() -> None:
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n```python no-run\ny\n```\n"
    assert python_blocks(text) == [(3, "x = 1\n")]


def test_programs_that_the_documents_name_are_installed() -> None:
    assert shutil.which("hfcore", path=str(Path(sys.executable).parent))
