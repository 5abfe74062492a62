"""What a checkpoint is quantised to while it is loaded: names, configs, what comes of them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint

import hfcore
from hfcore import (
    ChatHuggingFace,
    Engine,
    HuggingFacePipeline,
    InvalidRequestError,
    UnknownOptionError,
    _core,
    at_load,
    hub,
)  # fmt: skip
from hfcore.testing import tiny_model


class Config:
    """As transformers' BitsAndBytesConfig gives itself away."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def to_dict(self) -> dict[str, Any]:
        """Its keys in transformers 5, those without an underscore twice."""
        whole = {
            "quant_method": "bitsandbytes", "_load_in_8bit": False, "_load_in_4bit": True,
            "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None,
            "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
            "load_in_4bit": True, "load_in_8bit": False,
        }  # fmt: skip
        return whole | self.changes


def test_a_config_object_and_an_equal_dict_say_the_same() -> None:
    wanted = at_load.AtLoad("NF4", nested=True, skip=("lm_head",))
    assert at_load.wanted(None, Config()) == wanted
    short = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    assert at_load.wanted(None, short) == wanted
    assert at_load.config(Config()) == short | {"bnb_4bit_compute_dtype": "bfloat16"}
    assert at_load.wanted("q4_k_m") == at_load.AtLoad("q4_k_m")
    assert at_load.wanted(None, {"load_in_4bit": True}) == at_load.AtLoad("FP4", skip=("lm_head",))
    eight = {"load_in_8bit": True, "llm_int8_skip_modules": ["k_proj"]}
    assert at_load.wanted(None, eight) == at_load.AtLoad("Q8_0", skip=("k_proj",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_in_4bit": False}, "got neither"),
        ({"load_in_8bit": True}, "got both"),
        ({"llm_int8_threshold": 5.0}, "llm_int8_threshold must be 6.0, got 5.0"),
        ({"bnb_4bit_quant_type": "nf5"}, "'nf4', 'fp4', got 'nf5'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "must be 'uint8', got 'bfloat16'"),
        ({"bnb_4bit_compute_dtype": "int4"}, "float32, float16, bfloat16, got 'int4'"),
        ({"llm_int8_skip_modules": "lm_head"}, "must be a list of names"),
        ({"llm_int8_skip_modules": ["layers.*"]}, "patterns are not supported"),
        ({"llm_int8_has_fp16_weight": True}, "must be False, got True"),
        ({"bnb_4bit_use_double_quant": 1}, "must be True or False, got 1"),
        ({"quant_method": "gptq"}, "must be 'bitsandbytes', got 'gptq'"),
    ],
)
def test_a_key_acts_or_raises(changes: dict[str, Any], words: str) -> None:
    given = {"load_in_4bit": True, "load_in_8bit": False} | changes
    with pytest.raises(InvalidRequestError, match=words):
        at_load.wanted(None, given)


def test_an_unknown_key_gives_the_nearest() -> None:
    with pytest.raises(UnknownOptionError, match="did you mean 'bnb_4bit_quant_type'") as raised:
        at_load.config({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"})
    assert raised.value.nearest == "bnb_4bit_quant_type"
    with pytest.raises(InvalidRequestError, match="BitsAndBytesConfig or an equal dict, got str"):
        at_load.config("nf4")
    with pytest.raises(InvalidRequestError, match="give one"):
        at_load.wanted("nf4", {"load_in_4bit": True})


def test_a_wish_is_for_the_choice_of_a_file_or_for_loading(tmp_path: Path) -> None:
    small = tmp_path / "a-Q4_0.gguf"
    small.touch()
    assert hub.left_to_make(tmp_path, small, "q4_0") is None
    assert hub.left_to_make(small, small, "q8_0") == "q8_0"
    assert hub.left_to_make(f"{tmp_path}:Q4_0", small, None) is None
    assert hub.left_to_make("owner/name:nf4", tmp_path, None) == "nf4"
    assert hub.left_to_make("owner/name", tmp_path, None) is None


def _plain_model(folder: Path) -> Path:
    """The tiny model in F16."""
    return hfcore.quantize(tiny_model(folder), "f16", folder / "plain.gguf").path


def _logits(engine: Engine) -> np.ndarray:
    return engine.logits([1, 2, 3, 4, 5, 6])


def test_a_plain_gguf_is_quantised_as_the_file_would_be(tmp_path: Path) -> None:
    source = _plain_model(tmp_path)
    made = hfcore.quantize(source, "q4_0", tmp_path / "made.gguf").path
    with Engine(made) as file, Engine(source, quantization="q4_0") as loaded:
        # Rows of the embedding are read as the source has them: that is the whole difference.
        assert np.corrcoef(_logits(file), _logits(loaded))[0, 1] > 0.995
        assert loaded.info["quantization"] == "Q4_0"
        again = pickle.loads(pickle.dumps(loaded))
        assert np.array_equal(_logits(loaded), _logits(again))
        again.close()
        assert copy.copy(loaded) is loaded
    with pytest.raises(InvalidRequestError, match=r"quantised already: .*Q4_0"):
        Engine(made, quantization="nf4")
    with pytest.raises(hfcore.UnsupportedModelError, match="NF4"):
        Engine(source, quantization="q4_x")


def test_nf4_and_fp4_change_what_a_model_says_a_little(tmp_path: Path) -> None:
    source = _plain_model(tmp_path)
    with Engine(source) as engine:
        plain = _logits(engine)
    seen = []
    for changes in ({}, {"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": False},
                    {"llm_int8_skip_modules": ["ffn_down", "lm_head"]}):  # fmt: skip
        for device in ("cpu", "reference"):
            with Engine(source, quantization_config=Config(**changes), device=device) as engine:
                seen.append(_logits(engine))
                assert np.corrcoef(seen[-1], plain)[0, 1] > 0.9
        assert np.corrcoef(seen[-1], seen[-2])[0, 1] > 0.999
    assert all(not np.array_equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_cache_keeps_what_a_model_was_quantised_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFCORE_CACHE", str(tmp_path / "usual"))
    source = _plain_model(tmp_path)
    kept = tmp_path / "kept"
    for device in ("cpu", "reference"):
        for wish in ({"quantization": "q4_k_m"}, {"quantization_config": Config()}):
            opening: dict[str, Any] = {"device": device, **wish}
            with Engine(source, **opening) as engine:
                plain = _logits(engine)
            for cache in (kept, str(kept), True):
                with Engine(source, **opening, quantization_cache=cache) as engine:
                    assert np.array_equal(_logits(engine), plain)
    files = sorted(kept.iterdir())
    assert len(files) == 2
    assert len(list((tmp_path / "usual" / "quantized").iterdir())) == 2
    made = [file.stat().st_mtime_ns for file in files]
    bytes_of = files[0].read_bytes()
    files[0].write_bytes(bytes_of[:-1])
    for wish in ({"quantization": "q4_k_m"}, {"quantization_config": Config()}):
        with Engine(source, **wish, quantization_cache=kept):
            pass
    # The one that was cut short is made again, the other is used; nothing else is left there.
    assert files[0].read_bytes() == bytes_of
    assert [file.stat().st_mtime_ns for file in files][1] == made[1]
    assert sorted(kept.iterdir()) == files


def test_a_cache_without_anything_to_keep_is_refused(tmp_path: Path) -> None:
    source = _plain_model(tmp_path)
    with pytest.raises(InvalidRequestError, match="nothing to keep"):
        Engine(source, quantization_cache=True)
    with pytest.raises(InvalidRequestError, match="True or a directory, got 3"):
        Engine(source, quantization="q8_0", quantization_cache=3)  # type: ignore[arg-type]
    with pytest.raises(hfcore.ModelFileError, match=r"plain\.gguf"):
        Engine(source, quantization="q8_0", quantization_cache=source)


def test_a_pipeline_quantises_as_transformers_says_it(tmp_path: Path) -> None:
    model = str(tiny_checkpoint.write_checkpoint(tmp_path, tiny_checkpoint.weights()))
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

    def answer(**opening: Any) -> str:
        llm = HuggingFacePipeline(
            model_id=model, model_kwargs=opening, pipeline_kwargs={"max_new_tokens": 24}
        )
        return llm.invoke("Once upon")

    with Engine(model, quantization_config=config) as engine:
        direct = engine.generate("Once upon", max_tokens=24).text
        assert engine.info["quantization"] == "NF4"
    assert answer(quantization_config=config) == direct
    assert answer(quantization="q8_0") != ""
    chat = ChatHuggingFace.from_model_id(model, model_kwargs={"quantization_config": config})
    usage = chat.invoke("Hello", max_tokens=8).usage_metadata
    assert usage is not None
    assert usage["output_tokens"] > 0
    with pytest.raises(UnknownOptionError, match="bnb_4bit_quant_type"):
        answer(quantization_config={**config, "bnb_4bit_quant_kind": "nf4"})


def test_blocks_of_nf4_are_bitsandbytes() -> None:
    # bitsandbytes 0.50: quantize_4bit of these numbers on a CPU.
    numbers = np.linspace(-1.5, 3.0, 64, dtype=np.float32)[None]
    for kind, codes in (("NF4", NF4_CODES), ("FP4", FP4_CODES)):
        block = _core.quantize(kind, numbers)[0]
        assert block[:4].tobytes() == np.float32(3.0).tobytes()
        assert block[4:].tobytes().hex() == codes
        back = _core.dequantize(kind, block[None]).reshape(-1)
        # Half of the widest step, between two thirds of the largest and itself.
        assert np.abs(back - numbers[0]).max() <= 0.5


NF4_CODES = "223333344444555566667778888999aaaabbbbcccccdddddeeeeeeeeeeffffff"
FP4_CODES = "ddddcccccffffeeeee9990111666667777444445555555222222222223333333"
