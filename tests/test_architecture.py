"""Who may know whom, read from the sources: two ladders, homes of outside libraries, unsafe."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "rust" / "engine" / "src"
PACKAGE = ROOT / "python" / "hfcore"

# A file may use only what stands before it. `__init__` and `__main__` gather, so they come last.
PYTHON_LADDER = (
    "errors", "schemas", "metrics", "fetch", "at_load", "options", "_core", "hub", "loops",
    "engine", "quantization", "sentences",
    "backends", "urls", "responses", "connection", "wire", "answers", "remote", "placement",
    "transformers_backend", "testing", "parts", "messages", "tools", "structured", "llms",
    "endpoint", "chat_models", "embeddings", "endpoint_embeddings", "install",
    "server", "bench", "demo", "cli", "__init__", "__main__",
)  # fmt: skip

# `hfcore bench` is a package with a ladder of its own. Its worker stands alone: any Python runs it.
BENCH_LADDER = (
    "worker", "textworker", "processes", "machine", "model", "measures", "report", "texts",
    "session", "__init__",
)  # fmt: skip

# Each outside library has one home, so that a change of it has one place too.
RUST_HOMES = {
    "minijinja": {"template"},
    "minijinja_contrib": {"template"},
    "tokenizers": {"tokenizer", "vocab"},
    "regex": {"adapter"},
    "regex_syntax": {"tokenizer", "template"},
    "unicode_normalization_alignments": {"tokenizer"},
    "unicode_names2": {"template"},
    "num_bigint": {"template"},
    "candle_core": {"candle"},
    "llguidance": {"constraint"},
}
PYTHON_HOMES = {
    "langchain_core": {
        "messages",
        "tools",
        "structured",
        "chat_models",
        "llms",
        "embeddings",
        "endpoint_embeddings",
        "endpoint",
    },
    "anyio": {"connection"},
    "huggingface_hub": {"hub", "connection", "urls"},
    "numpy": {"_core", "engine", "sentences", "testing", "bench"},
    "matplotlib": {"bench"},
    "torch": {"bench", "transformers_backend"},
    "trio": {"loops"},
    "transformers": {"bench", "transformers_backend"},
}


# --- Rust ---------------------------------------------------------------------------------------


def rust_code(source: str) -> str:
    """The source without comments, strings and its own tests (which may look anywhere)."""
    source = source.split("#[cfg(test)]\nmod tests", 1)[0]
    pattern = r'//[^\n]*|/\*.*?\*/|r(#*)".*?"\1|"(?:\\.|[^"\\])*"'
    return re.sub(pattern, " ", source, flags=re.DOTALL)


def rust_ladder(lib: str) -> list[str]:
    """The modules of lib.rs in the order it declares them."""
    return re.findall(r"^(?:pub(?:\([a-z]+\))? )?mod (\w+);", rust_code(lib), flags=re.MULTILINE)


def rust_uses(source: str) -> set[str]:
    """Names directly under the crate's root that this file uses."""
    code = rust_code(source)
    names = set(re.findall(r"\bcrate::(?:r#)?(\w+)", code))
    for group in re.findall(r"\bcrate::\{(.*?)\};", code, flags=re.DOTALL):
        names |= set(re.findall(r"(?:^|,)\s*(\w+)", re.sub(r"\{[^{}]*\}", "", group)))
    return names


def rust_violations(name: str, source: str, ladder: list[str]) -> list[str]:
    """What this engine file uses and must not."""
    above = set(ladder[: ladder.index(name)]) | {name}
    found = [f"{name}.rs uses {used}, which is not above it" for used in rust_uses(source) - above]
    code = rust_code(source)
    for crate, homes in RUST_HOMES.items():
        if name not in homes and re.search(rf"\b{crate}::", code):
            found.append(f"{name}.rs uses the crate {crate}, which lives in {sorted(homes)}")
    return sorted(found)


LADDER = rust_ladder((ENGINE / "lib.rs").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LADDER)
def test_an_engine_file_uses_only_files_above_it_and_crates_at_home(name: str) -> None:
    files = [*ENGINE.glob(f"{name}.rs"), *ENGINE.glob(f"{name}/**/*.rs")]
    files = [path for path in files if path.name != "tests.rs"]  # tests may look anywhere
    assert files
    for path in files:
        assert rust_violations(name, path.read_text(encoding="utf-8"), LADDER) == []


def test_every_engine_file_stands_on_the_ladder() -> None:
    tops = {path.relative_to(ENGINE).parts[0].removesuffix(".rs") for path in ENGINE.rglob("*.rs")}
    assert tops == {*LADDER, "lib"}


def test_unsafe_code_lives_in_the_kernels_alone() -> None:
    files = [*ENGINE.rglob("*.rs"), *(ROOT / "rust" / "py").rglob("*.rs")]
    found = [f.name for f in files if re.search(r"\bunsafe\b", rust_code(f.read_text("utf-8")))]
    assert found == []
    assert "#![forbid(unsafe_code)]" in (ENGINE / "lib.rs").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("error", "use crate::engine::Engine;"),
        ("error", "use crate::{\n    engine::{Engine, Stream},\n};"),
        ("options", "fn f() -> crate::engine::Engine {}"),
        ("options", "use crate::Error;"),
        ("options", "use minijinja::Environment;"),
        ("engine", "fn f(t: tokenizers::Tokenizer) {}"),
    ],
)
def test_a_rust_file_that_looks_down_or_abroad_is_caught(name: str, source: str) -> None:
    assert rust_violations(name, source, ["error", "options", "template", "engine"]) != []


def test_comments_strings_and_tests_of_a_rust_file_may_say_anything() -> None:
    source = (
        '// crate::engine\nconst A: &str = "crate::engine"; /* unsafe\n */\n'
        "use crate::error::{Error, Result};\n"
        "#[cfg(test)]\nmod tests { use crate::engine::Engine; }"
    )
    assert rust_violations("options", source, ["error", "options", "engine"]) == []
    assert rust_uses(source) == {"error"}


# --- Python -------------------------------------------------------------------------------------


def python_uses(source: str, package: str = "hfcore") -> set[str]:
    """Dotted names of every module that this file imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level])
            base = ".".join(filter(None, [home if node.level else "", node.module or ""]))
            names = base in {"hfcore", "hfcore.bench"}
            found |= {f"{base}.{alias.name}" for alias in node.names} if names else {base}
    return found


def python_violations(name: str, source: str) -> list[str]:
    """What this file of the package uses and must not."""
    above = set(PYTHON_LADDER[: PYTHON_LADDER.index(name)])
    found = []
    for used in python_uses(source):
        top, _, rest = used.partition(".")
        if top == "hfcore" and rest.partition(".")[0] not in above:
            found.append(f"{name}.py uses {used}, which is not above it")
        if name not in PYTHON_HOMES.get(top, {name}):
            found.append(f"{name}.py uses {used}, which lives in {sorted(PYTHON_HOMES[top])}")
    return sorted(found)


def bench_violations(name: str, source: str) -> list[str]:
    """The same for a file of the package `hfcore.bench`."""
    above = {f"hfcore.bench.{other}" for other in BENCH_LADDER[: BENCH_LADDER.index(name)]}
    outer = {f"hfcore.{other}" for other in PYTHON_LADDER[: PYTHON_LADDER.index("bench")]}
    found = []
    for used in python_uses(source, "hfcore.bench"):
        top = used.partition(".")[0]
        if top == "hfcore" and name.endswith("worker") != (used == "hfcore"):
            found.append(f"bench/{name}.py uses {used}; the worker alone goes by the public API")
        elif top == "hfcore" and not name.endswith("worker") and not is_in(used, above | outer):
            found.append(f"bench/{name}.py uses {used}, which is not above it")
        if "bench" not in PYTHON_HOMES.get(top, {"bench"}):
            found.append(f"bench/{name}.py uses {used}, which lives in {sorted(PYTHON_HOMES[top])}")
    return sorted(found)


def is_in(used: str, modules: set[str]) -> bool:
    return any(used == module or used.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "bench").glob("*.py")), ids=lambda p: str(p.name)
)
def test_a_file_of_the_harness_uses_only_files_above_it(path: Path) -> None:
    assert path.stem in BENCH_LADDER, f"give {path.name} its place on the ladder"
    assert bench_violations(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("worker", "from .processes import Worker"),
        ("worker", "from hfcore import errors"),
        ("model", "from .measures import Plan"),
        ("model", "from ..cli import main"),
        ("report", "import hfcore"),
        ("report", "from langchain_core.messages import AIMessage"),
    ],
)
def test_a_file_of_the_harness_that_looks_down_is_caught(name: str, source: str) -> None:
    assert bench_violations(name, source) != []


MODULES = sorted(path for path in PACKAGE.glob("*.py*") if path.suffix in {".py", ".pyi"})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.name))
def test_a_python_file_uses_only_files_above_it_and_libraries_at_home(path: Path) -> None:
    assert path.stem in PYTHON_LADDER, f"give {path.name} its place on the ladder"
    assert python_violations(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("errors", "from hfcore.options import Options"),
        ("options", "from hfcore import Engine"),
        ("options", "from . import engine"),
        ("options", "def f():\n    from .engine import Engine"),
        ("engine", "import hfcore.cli"),
        ("engine", "from langchain_core.messages import AIMessage"),
        ("chat_models", "import huggingface_hub"),
    ],
)
def test_a_python_file_that_looks_down_or_abroad_is_caught(name: str, source: str) -> None:
    assert python_violations(name, source) != []


def test_the_plain_api_imports_neither_langchain_nor_the_hub() -> None:
    program = (
        "import sys, hfcore; hfcore.Engine; hfcore.ChatTemplate; hfcore.Tokenizer\n"
        "heavy = {'langchain_core', 'huggingface_hub', 'torch', 'pydantic'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""


def test_the_compiled_module_loads_without_numpy() -> None:
    program = "import sys\nimport hfcore._core\nprint('numpy' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
