"""What many tests share: the demo models, and the larger cases kept outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hfcore import fetch
from hfcore.testing import tiny_model


def demo_model(name: str) -> Path:
    """The demo model's file. Without it the test skips; in CI it fails if nobody tried."""
    path = fetch.path_of(name)
    if path.is_file():
        return path
    reason = fetch.failure_of(name)
    if reason is None and os.environ.get("CI") == "true":
        pytest.fail(f"{path.name} was never asked for; run `python -m hfcore.fetch {name}`")
    pytest.skip(reason or f"needs {path.name}; run `python -m hfcore.fetch {name}`")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of noise that the real engine runs; with a chat template."""
    return tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, with its chat template."""
    return demo_model("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M base, Q4_K_M."""
    return demo_model("gemma3")


@pytest.fixture(scope="session")
def cases() -> Path:
    """The larger cases, where HFCORE_CASES names their directory."""
    found = os.environ.get("HFCORE_CASES")
    if not found:
        pytest.skip("HFCORE_CASES is not set")
    return Path(found)
