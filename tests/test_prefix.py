"""Prefixes that are saved to a file and taken up by another engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hfcore import Engine, InvalidRequestError, ModelFileError
from hfcore.testing import tiny_model

TEXT = "A text that many requests begin with, long enough for some pages of the cache. " * 4
ASKED = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", ["f16", "int8"])
def test_what_was_saved_answers_as_what_ran(model: Path, tmp_path: Path, dtype: str) -> None:
    with Engine(model, kv_cache_dtype=dtype) as engine:
        answer = engine.generate(TEXT, **ASKED).text
        tokens = len(engine.tokenizer.encode(TEXT))
        saved = engine.save_prefix(tmp_path / "prefix")
    assert saved >= tokens - 16
    assert [file.name for file in tmp_path.iterdir()] == ["prefix"]  # nothing half-written
    with Engine(model, kv_cache_dtype=dtype) as engine:
        assert engine.load_prefix(tmp_path / "prefix") == saved
        assert engine.generate(TEXT, **ASKED).text == answer
        assert engine.metrics()["prefix_hit_tokens"] >= tokens - 17
    other = "f16" if dtype == "int8" else "int8"
    with Engine(model, kv_cache_dtype=other) as engine, pytest.raises(ModelFileError):
        engine.load_prefix(tmp_path / "prefix")


def test_the_file_is_of_one_model_wherever_that_lies(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "prefix"
    with Engine(model) as engine:
        engine.generate(TEXT, **ASKED)
        tokens = engine.save_prefix(saved)
    moved = shutil.copy(model, tmp_path / "moved.gguf")
    with Engine(moved) as engine:
        assert engine.load_prefix(saved) == tokens
    other = tiny_model(tmp_path, name="other", seed=1)
    with Engine(other) as engine, pytest.raises(ModelFileError, match="another model"):
        engine.load_prefix(saved)


def test_what_is_no_such_file_is_refused(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "prefix"
    with Engine(model) as engine:
        engine.generate(TEXT, **ASKED)
        engine.save_prefix(saved)
        whole = saved.read_bytes()
        for spoilt in (b"", b"HFCOREKV", whole[:100], whole[:-1], whole + b"x", model.read_bytes()):
            saved.write_bytes(spoilt)
            with pytest.raises(ModelFileError):
                engine.load_prefix(saved)
        with pytest.raises(ModelFileError):
            engine.load_prefix(tmp_path / "missing")
        with pytest.raises(ModelFileError):
            engine.save_prefix(tmp_path / "missing" / "prefix")


def test_what_keeps_nothing_saves_nothing(model: Path, tmp_path: Path) -> None:
    with Engine(model, prefix_cache=False) as engine, pytest.raises(InvalidRequestError):
        engine.save_prefix(tmp_path / "prefix")
    with (
        Engine(model, device="reference") as engine,
        pytest.raises(InvalidRequestError, match="cpu"),
    ):
        engine.save_prefix(tmp_path / "prefix")
