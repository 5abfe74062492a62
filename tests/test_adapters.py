"""LoRA adapters: as if merged, each request its own, and nobody notices the others'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_checkpoint import OUTPUTS, VOCAB, Lora, weights, write_checkpoint, write_safetensors

from hfcore import ChatHuggingFace, Engine, HuggingFacePipeline
from hfcore import testing as hfcore_testing
from hfcore.errors import InvalidRequestError, ModelFileError, UnsupportedModelError

IDS = [int(i) for i in np.random.default_rng(5).integers(0, 250, 40)]


def divergence(wanted: NDArray[Any], got: NDArray[Any]) -> float:
    """The largest KL divergence of any position."""

    def logs(x: NDArray[Any]) -> NDArray[np.float64]:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        logs: NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return logs

    a, b = logs(wanted), logs(got)
    return float((np.exp(a) * (a - b)).sum(-1).max())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), weights())


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three adapters: of all linear layers, of queries and values, of the second layer's rest."""
    where = tmp_path_factory.mktemp("loras")
    of = {
        "all": Lora(seed=1),
        "qv": Lora(["self_attn.q_proj", "self_attn.v_proj"], rank=8, seed=2),
        "mlp": Lora(["mlp.up_proj", "mlp.down_proj"], rank=2, alpha=6, seed=3, layers=[1]),
    }
    return {name: str(lora.write(where / name)) for name, lora in of.items()}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "lora",
    [
        Lora(),
        Lora(["self_attn.q_proj", "self_attn.v_proj"], rank=8, alpha=8),
        Lora(rank=3, alpha=5, rslora=True),
        Lora(ranks={"k_proj": 7, "up_proj": 1}, alphas={"k_proj": 3, "o_proj": 40}),
        Lora(["mlp.gate_proj"], layers=[1]),
    ],
    ids=["all", "q and v", "rslora", "patterns", "one layer"],
)
def test_an_adapter_gives_what_merging_it_gives(
    tmp_path: Path, model_type: str, lora: Lora
) -> None:
    tensors = weights(model_type)
    base = write_checkpoint(tmp_path / "base", tensors, model_type)
    merged = write_checkpoint(tmp_path / "merged", lora.merged(tensors), model_type)
    adapters = {"a": str(lora.write(tmp_path / "a"))}
    for device, limit in [("reference", 1e-9), ("cpu", 1e-6)]:
        with (
            Engine(base, device=device, adapters=adapters) as engine,
            Engine(merged, device=device) as wanted,
        ):
            want = wanted.logits(IDS, last_only=False)
            got = engine.logits(IDS, last_only=False, adapter="a")
            assert divergence(want, got) < limit
            assert divergence(want, engine.logits(IDS, last_only=False)) > 1e-3
            a = engine.generate(IDS, max_tokens=24, temperature=0, ignore_eos=True, adapter="a")
            b = wanted.generate(IDS, max_tokens=24, temperature=0, ignore_eos=True)
            assert a.token_ids == b.token_ids


def test_a_gguf_file_takes_an_adapter_of_its_checkpoint(tmp_path: Path) -> None:
    """llama's query and key rows lie in another order there."""
    tensors = weights()
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    of_model = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    of_model["model.norm.weight"] = "output_norm.weight"
    stored: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if name in of_model:
            stored[of_model[name]] = tensor
            continue
        layer, module = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        ours = names[module]
        if ours in ("attn_q", "attn_k"):
            heads = tensor.reshape(-1, 2, 8, tensor.shape[1])
            tensor = heads.swapaxes(1, 2).reshape(tensor.shape)
        stored[f"blk.{layer}.{ours}.weight"] = tensor
    about = hfcore_testing._metadata("tiny", 512, None)
    tokens = about["tokenizer.ggml.tokens"][:VOCAB]
    about["tokenizer.ggml.tokens"] = tokens
    about["tokenizer.ggml.token_type"] = [1] * VOCAB
    about["tokenizer.ggml.merges"] = about["tokenizer.ggml.merges"][:3]
    about["llama.vocab_size"] = VOCAB
    for key in ("bos", "eos"):
        about[f"tokenizer.ggml.{key}_token_id"] = VOCAB - 1
    path = tmp_path / "tiny.gguf"
    path.write_bytes(hfcore_testing._gguf(about, stored))
    lora = Lora()
    merged = write_checkpoint(tmp_path / "merged", lora.merged(tensors))
    adapters = {"a": str(lora.write(tmp_path / "a"))}
    with Engine(merged, device="reference") as wanted:
        want = wanted.logits(IDS, last_only=False)
    for device in ("reference", "cpu"):
        with Engine(path, device=device, adapters=adapters) as engine:
            # What is stored has 8 bits; heads in the wrong order are off by 0.1 and more.
            assert divergence(want, engine.logits(IDS, last_only=False, adapter="a")) < 2e-2


def test_requests_with_and_without_adapters_run_together_as_alone(
    base: Path, loras: dict[str, str]
) -> None:
    prompts = [(name, IDS[: 5 + 3 * i]) for i, name in enumerate([None, *loras, None, *loras])]
    asked: dict[str, Any] = {
        "max_tokens": 20, "ignore_eos": True, "logprobs": True, "temperature": 0.8, "seed": 3,
    }  # fmt: skip
    with Engine(base, adapters=loras, prefix_cache=False) as engine:
        alone = [engine.generate(ids, **asked, adapter=name) for name, ids in prompts]
    with Engine(base, adapters=loras) as engine:
        streams = [engine.stream(ids, **asked, adapter=name) for name, ids in prompts]
        together = [list(stream) for stream in streams]
    for one, deltas in zip(alone, together, strict=True):
        assert one.token_ids == tuple(i for delta in deltas for i in delta.token_ids)
        assert one.logprobs == tuple(p for delta in deltas for p in delta.logprobs or ())
    assert len({one.token_ids[:8] for one in alone[:4]}) == 4


def test_adapters_that_others_use_change_no_bit_of_a_plain_request(
    base: Path, loras: dict[str, str]
) -> None:
    with Engine(base) as plain, Engine(base, adapters=loras) as engine:
        want = plain.logits(IDS, last_only=False)
        engine.logits(IDS, adapter="all")
        assert np.array_equal(want, engine.logits(IDS, last_only=False))


def test_what_ran_with_an_adapter_is_no_prefix_of_other_requests(
    base: Path, loras: dict[str, str]
) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    names = [None, "all", "qv", None, "all"]
    with Engine(base, adapters=loras, prefix_cache=False) as engine:
        wanted = [engine.generate(IDS, **asked, adapter=name).token_ids for name in names]
    with Engine(base, adapters=loras) as engine:
        got = [engine.generate(IDS, **asked, adapter=name).token_ids for name in names]
        # The last two find what the first two have left: two whole pages each.
        assert engine.metrics()["prefix_hit_tokens"] == 2 * 32
    assert got == wanted


def test_prefixes_of_adapters_are_not_saved(
    base: Path, loras: dict[str, str], tmp_path: Path
) -> None:
    with Engine(base, adapters=loras) as engine:
        engine.generate(IDS, max_tokens=1, adapter="all")
        assert engine.save_prefix(tmp_path / "prefix") == 0
        engine.generate(IDS, max_tokens=1)
        assert engine.save_prefix(tmp_path / "prefix") == 32


def test_a_draft_model_and_guesses_change_no_token(base: Path, loras: dict[str, str]) -> None:
    asked: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with Engine(base, adapters=loras, speculation=False) as engine:
        want = engine.generate(IDS, **asked, adapter="qv").token_ids
    with Engine(base, adapters=loras, draft_model=base) as engine:
        assert engine.generate(IDS, **asked, adapter="qv").token_ids == want


def test_an_adapter_is_loaded_by_its_path_when_first_asked_for(
    base: Path, loras: dict[str, str]
) -> None:
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with Engine(base, adapters=loras) as engine:
        want = engine.generate(IDS, **asked, adapter="qv").token_ids
    with Engine(base) as engine:
        plain = engine.generate(IDS, **asked).token_ids
        assert engine.generate(IDS, **asked, adapter=Path(loras["qv"])).token_ids == want != plain
    with Engine(base, adapters=[loras["qv"]]) as engine:
        assert engine.generate(IDS, **asked, adapter=loras["qv"]).token_ids == want


async def test_the_langchain_classes_pass_it_on(base: Path, loras: dict[str, str]) -> None:
    llm = HuggingFacePipeline(
        model_id=str(base),
        model_kwargs={"adapters": loras},
        pipeline_kwargs={"max_new_tokens": 12, "temperature": 0, "adapter": "all"},
    )
    with Engine(base, adapters=loras) as engine:
        of = {
            name: engine.generate("Hello", max_tokens=12, temperature=0, adapter=name).text
            for name in [*loras, None]
        }
    assert llm.invoke("Hello") == of["all"]
    assert llm.invoke("Hello", adapter="mlp") == of["mlp"]
    assert await llm.ainvoke("Hello", adapter="qv") == of["qv"]
    chat = ChatHuggingFace(llm=llm)
    assert chat.invoke("Hi").content != chat.invoke("Hi", adapter="qv").content
    key = chat._get_llm_string(adapter="qv")
    assert key != chat._get_llm_string()


def test_an_unknown_adapter_is_named_with_the_nearest(base: Path, loras: dict[str, str]) -> None:
    with Engine(base, adapters=loras) as engine:
        with pytest.raises(InvalidRequestError, match='got "alls"; did you mean "all"'):
            engine.generate(IDS, adapter="alls")
        with pytest.raises(InvalidRequestError, match="text that is not empty"):
            engine.generate(IDS, adapter="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_is_more_than_lora_is_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lora = Lora()
    lora.config |= change
    with pytest.raises(UnsupportedModelError, match=message):
        Engine(base, adapters={"a": lora.write(tmp_path / "a")})


def test_tensors_without_a_place_are_refused(base: Path, tmp_path: Path) -> None:
    lora = Lora()
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    lora.tensors[name] = np.zeros((4, VOCAB), np.float32)
    with pytest.raises(UnsupportedModelError, match="lora_embedding_A"):
        Engine(base, adapters={"a": lora.write(tmp_path / "embedding")})
    lora = Lora()
    for half in "AB":
        old = f"base_model.model.model.layers.1.mlp.up_proj.lora_{half}.weight"
        lora.tensors[old.replace("up_proj", "up_prj")] = lora.tensors.pop(old)
    with pytest.raises(UnsupportedModelError, match=r"up_prj.*nearest is .*up_proj"):
        Engine(base, adapters={"a": lora.write(tmp_path / "name")})


def test_damaged_files_are_refused(base: Path, tmp_path: Path) -> None:
    def refused(directory: Path, message: str) -> None:
        with pytest.raises(ModelFileError, match=message):
            Engine(base, adapters={"a": directory})

    refused(tmp_path / "nothing", "adapter_config.json: no such file")
    lora = Lora()
    written = lora.write(tmp_path / "a")
    file = written / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    refused(written, "cut short")
    name = next(name for name in lora.tensors if name.endswith("lora_A.weight"))
    for tensor, message in [
        (np.zeros((4, 63), np.float32), r"\[4, 63\]"),
        (np.zeros((5, OUTPUTS["self_attn.q_proj"][1]), np.float32), r"\[rank, 64\]"),
        (np.full((4, 64), np.nan, np.float32), "not finite"),
    ]:
        write_safetensors(file, lora.tensors | {name: tensor})
        refused(written, message)
    write_safetensors(file, {n: t for n, t in lora.tensors.items() if n != name})
    refused(written, "lora_A.weight")
    write_safetensors(file, {})
    refused(written, "no LoRA matrices")
    write_safetensors(file, lora.tensors)
    config = written / "adapter_config.json"
    config.write_text(json.dumps(lora.config | {"alpha_pattern": {"(q_proj": 3}}))
    refused(written, "alpha_pattern")
    config.write_text(json.dumps(lora.config | {"lora_alpha": "many"}))
    refused(written, "lora_alpha")
    file.unlink()
    refused(written, "pickled weights")
