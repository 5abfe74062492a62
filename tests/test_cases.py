"""The acceptance cases kept outside the repository; HFCORE_CASES says where.

Each runner prints `<n> of <m>` on its last line and exits with 0 only when all are right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ADAPTERS = Path(__file__).parent / "adapters"

pytestmark = [
    pytest.mark.skipif("HFCORE_CASES" not in os.environ, reason="HFCORE_CASES is not set"),
    pytest.mark.timeout(600),
]


def run(runner: str, adapter: str, *arguments: str, device: str = "cpu") -> list[str]:
    """The lines that a runner prints."""
    path = Path(os.environ["HFCORE_CASES"]) / runner
    done = subprocess.run(
        [sys.executable, path, ADAPTERS / adapter, *arguments],
        env={**os.environ, "HFCORE_CASE_DEVICE": device},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.stdout, done.stderr
    print(done.stdout)
    return done.stdout.strip().splitlines()


def counts(line: str) -> tuple[int, int]:
    """`<n> of <m> ...` as numbers."""
    n, _, m, *_ = line.split()
    return int(n), int(m)


def test_ids_text_and_offsets_are_those_of_the_tokenizers_crate() -> None:
    n, m = counts(run("text/run_tokens.py", "text.py")[-1])
    assert n == m > 9000


def test_templates_render_as_transformers_renders_them() -> None:
    n, m = counts(run("text/run_templates.py", "text.py", "--strict-errors")[-1])
    assert n == m > 5000


def test_every_probe_of_a_jinja_feature_is_identical() -> None:
    n, m = counts(run("text/run_templates.py", "text.py", "--probes")[-1])
    assert n == m > 200


@pytest.mark.parametrize(("device", "mode"), [("reference", "strict"), ("cpu", "int8")])
def test_families_give_the_numbers_of_transformers(device: str, mode: str, tmp_path: Path) -> None:
    out = tmp_path / "verdicts.json"
    run("families/check.py", "families.py", "--mode", mode, "--json", str(out), device=device)
    verdicts = {
        name: verdict for name, verdict in json.loads(out.read_text()).items() if "pass" in verdict
    }
    wrong = {name: verdict for name, verdict in verdicts.items() if not verdict["pass"]}
    assert not wrong
    assert len(verdicts) >= 20


def test_real_models_are_near_transformers(smollm2: Path, gemma3: Path, tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m-instruct-q4_1.gguf").symlink_to(smollm2)
    (tmp_path / "gemma-3-270m-q4_k_m.gguf").symlink_to(gemma3)
    arguments = ("--mode", "int8", "--only", "real/", "--models", str(tmp_path))
    lines = run("families/check.py", "families.py", *arguments)
    assert lines[-1] == "2 of 2 families pass", lines
