"""`hfcore.quantize`: numbers to blocks, mixtures, files that other programs read too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hfcore
from hfcore import Engine, ModelFileError, UnsupportedModelError, _core
from hfcore.cli import main
from hfcore.quantization import mean_nll
from hfcore.testing import tiny_model


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_blocks_are_the_gguf_packages_bit_for_bit(name: str, cases: Path) -> None:
    wanted = np.load(cases / "families" / "gguf" / "dequant_cases.npz")
    blocks = _core.quantize(name, wanted["quantize.input"].astype(np.float32))
    assert np.array_equal(blocks, wanted[f"quantize.{name}"])


def test_importance_makes_important_numbers_more_exact() -> None:
    numbers = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    importance = np.full_like(numbers, 0.01)
    importance[:, ::4] = 10

    def error(blocks: np.ndarray) -> float:
        back = _core.dequantize("Q2_K", blocks).reshape(numbers.shape)
        return float(np.square(back - numbers)[:, ::4].mean())

    plain = error(_core.quantize("Q2_K", numbers))
    assert error(_core.quantize("Q2_K", numbers, importance=importance)) < 0.9 * plain


def test_what_is_no_row_of_blocks_is_refused() -> None:
    numbers = np.zeros((2, 40), dtype=np.float32)
    with pytest.raises(hfcore.InvalidRequestError, match="multiples of 32"):
        _core.quantize("Q8_0", numbers)
    with pytest.raises(UnsupportedModelError, match="Q4_K"):
        _core.quantize("Q9", numbers)
    with pytest.raises(hfcore.InvalidRequestError, match="float32"):
        _core.quantize("Q8_0", numbers.astype(np.float64))


def test_a_quantised_file_is_the_model_in_other_types(tmp_path: Path) -> None:
    source = tiny_model(tmp_path)
    told: list[tuple[int, int]] = []
    done = hfcore.quantize(
        source, "Q5_1", tmp_path / "small.gguf", progress=lambda *to: told.append(to)
    )
    assert done.bytes < done.bytes_before
    assert told[-1] == (done.bytes_before, done.bytes_before)
    with Engine(source) as before, Engine(done.path) as after:
        assert after.info["quantization"] == "Q5_1"
        assert after.info["parameters"] == before.info["parameters"]
        assert list(after.tokenizer.encode("Hello")) == list(before.tokenizer.encode("Hello"))
        assert after.chat_template is not None
        a, b = (engine.logits([1, 2, 3, 4]) for engine in (before, after))
        assert np.corrcoef(a, b)[0, 1] > 0.98
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_what_is_quantised_already_is_so_again_only_if_asked(tmp_path: Path) -> None:
    source = tiny_model(tmp_path)
    once = hfcore.quantize(source, "q4_0", tmp_path / "once.gguf").path
    with pytest.raises(UnsupportedModelError, match=r"Q4_0 of .*F16"):
        hfcore.quantize(once, "q8_0", tmp_path / "twice.gguf")
    hfcore.quantize(once, "q8_0", tmp_path / "twice.gguf", allow_requantize=True)
    with pytest.raises(UnsupportedModelError, match="Q4_K_M"):
        hfcore.quantize(source, "q4_x", tmp_path / "no.gguf")
    with pytest.raises(ModelFileError):
        hfcore.quantize(source, "q4_0", tmp_path / "missing" / "no.gguf")
    with pytest.raises(ModelFileError, match="no importance matrix"):
        hfcore.quantize(source, "q4_0", tmp_path / "no.gguf", imatrix=source)
    with pytest.raises(RuntimeError, match="enough"):
        hfcore.quantize(source, "q4_0", tmp_path / "no.gguf", progress=_stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "once.gguf", "tiny.gguf", "twice.gguf",
    ]  # fmt: skip


def _stop(done: int, total: int) -> None:
    raise RuntimeError("enough")


def test_the_command_says_what_it_wrote_and_what_it_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_model(tmp_path)
    text = tmp_path / "text"
    text.write_text("One two three, one two three. " * 8)
    small = tmp_path / "small.gguf"
    assert (
        main(["quantize", str(source), "--to", "q4_0", "-o", str(small), "--text", str(text)]) == 0
    )
    out = capsys.readouterr().out
    assert "small.gguf: " in out
    assert "mean NLL" in out
    assert main(["quantize", str(source), "--to", "q9", "-o", str(small)]) == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_a_checkpoint_becomes_a_file_that_says_the_same(
    family: str, cases: Path, tmp_path: Path
) -> None:
    source = cases / "families" / family
    made = hfcore.quantize(source, "f32", tmp_path / "made.gguf").path
    with Engine(source, device="reference") as before, Engine(made, device="reference") as after:
        a, b = (engine.logits([1, 2, 3, 4, 5]) for engine in (before, after))
        assert np.abs(a - b).max() < 1e-4
        text = "It's 2024, isn't it?"
        assert list(after.tokenizer.encode(text)) == list(before.tokenizer.encode(text))


def test_a_checkpoint_that_a_file_cannot_say_is_refused(cases: Path, tmp_path: Path) -> None:
    families = cases / "families"
    with pytest.raises(UnsupportedModelError, match="scale of attention scores"):
        hfcore.quantize(families / "gemma2", "q8_0", tmp_path / "no.gguf")
    with pytest.raises(UnsupportedModelError, match="qwen3moe"):
        hfcore.quantize(families / "qwen3_moe", "q8_0", tmp_path / "no.gguf")
    with pytest.raises(UnsupportedModelError, match="NF4"):
        hfcore.quantize(families / "llama", "nf4", tmp_path / "no.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_real_model_loses_little(smollm2: Path, tmp_path: Path) -> None:
    whole = hfcore.quantize(smollm2, "f16", tmp_path / "f16.gguf", allow_requantize=True).path
    small = hfcore.quantize(whole, "q4_k_m", tmp_path / "q4.gguf").path
    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")[:4000]
    before, after = mean_nll(whole, text), mean_nll(small, text)
    assert before < 3
    assert after < 1.06 * before
