"""Embedders of noise, one of each family, as their makers write them, and transformers' vectors.

With transformers and torch, `python tests/tiny_embedders.py` writes embedder_goldens.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDENS = Path(__file__).parent / "embedder_goldens.json"
TEXTS = ["a", "Which rivers are there?", "naïve café — 東京 🙂", "The quick brown fox. " * 9]
HIDDEN, HEADS, FFN, LAYERS, PLACES = 32, 2, 48, 3, 320
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
VOCAB = len(SPECIALS) + 256
DENSE = 24

_BERT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": PLACES,
    "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
_ROTARY = {
    "model_type": "nomic_bert", "vocab_size": VOCAB, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "type_vocab_size": 2,
}  # fmt: skip
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1,
    "head_dim": 16, "max_position_embeddings": PLACES, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**_BERT, "model_type": "bert", "architectures": ["BertModel"]},
    "distilbert": {
        "model_type": "distilbert", "vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": FFN,
        "n_layers": LAYERS, "n_heads": HEADS, "max_position_embeddings": PLACES,
        "activation": "gelu", "pad_token_id": 0,
    },
    "roberta": {**_BERT, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1},
    "mpnet": {
        **_BERT, "model_type": "mpnet", "pad_token_id": 1, "relative_attention_num_buckets": 32,
    },
    "albert": {
        **_BERT, "model_type": "albert", "embedding_size": 16, "num_hidden_groups": 1,
        "inner_group_num": 1, "hidden_act": "gelu_new",
    },
    # As nomic-ai's files name things, and as transformers 5 does.
    "nomic_bert": {
        **_ROTARY, "n_embd": HIDDEN, "n_inner": FFN, "n_layer": LAYERS, "n_head": HEADS,
        "n_positions": PLACES, "layer_norm_epsilon": 1e-12, "activation_function": "swiglu",
        "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
        "rotary_scaling_factor": None, "prenorm": False, "qkv_proj_bias": False,
    },
    "nomic_bert_5": {
        **_ROTARY, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": PLACES, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "modernbert": {
        **_BERT, "model_type": "modernbert", "num_hidden_layers": 4,
        "global_attn_every_n_layers": 3, "local_attention": 16,
        "global_rope_theta": 160000.0, "local_rope_theta": 10000.0,
        "hidden_activation": "gelu", "norm_eps": 1e-5, "cls_token_id": 1, "sep_token_id": 2,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen3": {
        **_DECODER, "model_type": "qwen3", "hidden_act": "silu", "rope_theta": 1000000.0,
        "architectures": ["Qwen3ForCausalLM"],
    },
    "gemma3_text": {
        **_DECODER, "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16, "sliding_window": 16, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "use_bidirectional_attention": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "architectures": ["Gemma3TextModel"],
    },
}  # fmt: skip
DECODERS = ("qwen3", "gemma3_text")


def first_token(family: str) -> int:
    """The token that a text begins with: none that transformers takes for padding."""
    return 3 if FAMILIES[family].get("pad_token_id") == 1 else 1


def ids(family: str, text: str) -> list[int]:
    """The tokens of a text: its bytes, between two special ones; for qwen3 before one."""
    own = [len(SPECIALS) + byte for byte in text.encode()]
    return [*own, 2] if family == "qwen3" else [first_token(family), *own, 2]


def pooling(family: str) -> str:
    """The pooling of the model that a family stands for."""
    return {"qwen3": "lasttoken", "modernbert": "cls"}.get(family, "mean")


def write(folder: Path, family: str, seed: int = 0) -> Path:
    """The model's directory: transformers opens it, and hfcore."""
    from hfcore.testing import safetensors

    random = np.random.RandomState(seed)  # its numbers never change
    folder.mkdir(parents=True, exist_ok=True)

    def noise(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        scale = 0.2 if len(shape) == 1 else shape[-1] ** -0.5 * 1.5
        numbers = (random.standard_normal(shape) * scale).astype(np.float32)
        return numbers + 1 if len(shape) == 1 and name.endswith("weight") else numbers

    tensors = {name: noise(name, shape) for name, shape in _shapes(family)}
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    modules = ["", "1_Pooling"]
    files: dict[str, Any] = {
        "config.json": FAMILIES[family],
        "tokenizer.json": _tokenizer(family),
        "1_Pooling/config.json": {"pooling_mode": pooling(family)},
    }
    if family == "gemma3_text":
        modules.append("2_Dense")
        files["2_Dense/config.json"] = {
            "in_features": HIDDEN, "out_features": DENSE, "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }  # fmt: skip
    modules.append("3_Normalize")
    files["modules.json"] = [
        {"idx": i, "name": str(i), "path": path,
         "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
        for i, path in enumerate(modules)
    ]  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    if family == "gemma3_text":
        shapes = {"linear.weight": (DENSE, HIDDEN), "linear.bias": (DENSE,)}
        dense = {name: noise(name, shape) for name, shape in shapes.items()}
        (folder / "2_Dense" / "model.safetensors").write_bytes(safetensors(dense))
    return folder


def _tokenizer(family: str) -> dict[str, Any]:
    from hfcore.testing import _byte_characters

    names = [*SPECIALS, *_byte_characters()]
    tokens = {name: i for i, name in enumerate(names)}
    special = (SPECIALS[first_token(family)], "[SEP]")
    around = [{"SpecialToken": {"id": name, "type_id": 0}} for name in special]
    before = [] if family == "qwen3" else around[:1]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, name in enumerate(SPECIALS)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing", "pair": [],
            "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, around[1]],
            "special_tokens": {
                name: {"id": name, "ids": [tokens[name]], "tokens": [name]}
                for name in special
            },
        },
        "model": {"type": "BPE", "vocab": tokens, "merges": []},
    }  # fmt: skip


def _both(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A weight and its bias."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _shapes(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors' names and shapes."""
    if family in DECODERS:
        yield from _decoder_shapes(family)
    elif family == "modernbert":
        yield from _modernbert_shapes()
    elif family.startswith("nomic"):
        yield from _nomic_shapes(old=family == "nomic_bert")
    else:
        yield from _bert_shapes(family)


def _bert_shapes(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = 16 if family == "albert" else HIDDEN
    kinds = FAMILIES[family].get("type_vocab_size")
    yield "embeddings.word_embeddings.weight", (VOCAB, width)
    yield "embeddings.position_embeddings.weight", (PLACES, width)
    if family not in ("mpnet", "distilbert"):
        yield "embeddings.token_type_embeddings.weight", (kinds or 2, width)
    yield from _both("embeddings.LayerNorm", width)
    if family == "mpnet":
        yield "encoder.relative_attention_bias.weight", (32, HEADS)
    layer, qkv, output, first, up, down, second = {
        "distilbert": ("transformer.layer.{}", "attention.{}_lin", "attention.out_lin",
                       "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
        "mpnet": ("encoder.layer.{}", "attention.attn.{}", "attention.attn.o",
                  "attention.LayerNorm", "intermediate.dense", "output.dense",
                  "output.LayerNorm"),
        "albert": ("encoder.albert_layer_groups.0.albert_layers.0", "attention.{}",
                   "attention.dense", "attention.LayerNorm", "ffn", "ffn_output",
                   "full_layer_layer_norm"),
    }.get(family, ("encoder.layer.{}", "attention.self.{}", "attention.output.dense",
                   "attention.output.LayerNorm", "intermediate.dense", "output.dense",
                   "output.LayerNorm"))  # fmt: skip
    if family == "albert":
        yield from _both("encoder.embedding_hidden_mapping_in", HIDDEN, width)
    short = family in ("mpnet", "distilbert")
    for i in range(1 if family == "albert" else LAYERS):
        at = layer.format(i)
        for part in ("q", "k", "v") if short else ("query", "key", "value"):
            yield from _both(f"{at}.{qkv.format(part)}", HIDDEN, HIDDEN)
        yield from _both(f"{at}.{output}", HIDDEN, HIDDEN)
        yield from _both(f"{at}.{first}", HIDDEN)
        yield from _both(f"{at}.{up}", FFN, HIDDEN)
        yield from _both(f"{at}.{down}", HIDDEN, FFN)
        yield from _both(f"{at}.{second}", HIDDEN)


def _nomic_shapes(*, old: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embeddings.word_embeddings.weight", (VOCAB, HIDDEN)
    yield "embeddings.token_type_embeddings.weight", (2, HIDDEN)
    yield from _both("emb_ln" if old else "embeddings.LayerNorm", HIDDEN)
    for i in range(LAYERS):
        at = f"encoder.layers.{i}" if old else f"layers.{i}"
        if old:
            yield f"{at}.attn.Wqkv.weight", (3 * HIDDEN, HIDDEN)
        else:
            for part in "qkv":
                yield f"{at}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
        output, up, gate, down, first, second = (
            ("attn.out_proj", "mlp.fc11", "mlp.fc12", "mlp.fc2", "norm1", "norm2")
            if old
            else ("self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj",
                  "post_attention_layernorm", "post_mlp_layernorm")
        )  # fmt: skip
        yield f"{at}.{output}.weight", (HIDDEN, HIDDEN)
        yield f"{at}.{up}.weight", (FFN, HIDDEN)
        yield f"{at}.{gate}.weight", (FFN, HIDDEN)
        yield f"{at}.{down}.weight", (HIDDEN, FFN)
        yield from _both(f"{at}.{first}", HIDDEN)
        yield from _both(f"{at}.{second}", HIDDEN)


def _modernbert_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embeddings.tok_embeddings.weight", (VOCAB, HIDDEN)
    yield "embeddings.norm.weight", (HIDDEN,)
    for i in range(FAMILIES["modernbert"]["num_hidden_layers"]):
        if i:
            yield f"layers.{i}.attn_norm.weight", (HIDDEN,)
        yield f"layers.{i}.attn.Wqkv.weight", (3 * HIDDEN, HIDDEN)
        yield f"layers.{i}.attn.Wo.weight", (HIDDEN, HIDDEN)
        yield f"layers.{i}.mlp_norm.weight", (HIDDEN,)
        yield f"layers.{i}.mlp.Wi.weight", (2 * FFN, HIDDEN)
        yield f"layers.{i}.mlp.Wo.weight", (HIDDEN, FFN)
    yield "final_norm.weight", (HIDDEN,)


def _decoder_shapes(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    yield "embed_tokens.weight", (VOCAB, HIDDEN)
    yield "norm.weight", (HIDDEN,)
    for i in range(LAYERS):
        at = f"layers.{i}"
        for name, outputs in (("q", HIDDEN), ("k", 16), ("v", 16), ("o", HIDDEN)):
            yield f"{at}.self_attn.{name}_proj.weight", (outputs, HIDDEN)
        for name in ("q", "k"):
            yield f"{at}.self_attn.{name}_norm.weight", (16,)
        for name in norms:
            yield f"{at}.{name}.weight", (HIDDEN,)
        yield f"{at}.mlp.gate_proj.weight", (FFN, HIDDEN)
        yield f"{at}.mlp.up_proj.weight", (FFN, HIDDEN)
        yield f"{at}.mlp.down_proj.weight", (HIDDEN, FFN)


def golden(folder: Path, family: str) -> list[list[float]]:
    """Vectors of `TEXTS` by transformers, pooled as sentence-transformers does, of unit length."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    if family == "nomic_bert":
        # transformers reads these tensors' names, not this configuration's.
        rope = {"rope_type": "default", "rope_theta": 1000.0}
        config = AutoConfig.for_model(**{**FAMILIES["nomic_bert_5"], "rope_parameters": rope})
    model, report = AutoModel.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    missing = [n for n in report["missing_keys"] if "pooler" not in n]
    assert not missing, missing
    assert not report["unexpected_keys"], report
    model.eval()
    vectors = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(torch.tensor([ids(family, text)])).last_hidden_state[0]
            how = pooling(family)
            pooled = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[how]
            if (folder / "2_Dense").exists():
                load_file = import_module("safetensors.torch").load_file
                dense = load_file(folder / "2_Dense" / "model.safetensors")
                pooled = torch.tanh(dense["linear.weight"] @ pooled + dense["linear.bias"])
            pooled = pooled / pooled.norm()
        vectors.append([round(float(x), 7) for x in pooled])
    return vectors


if __name__ == "__main__":
    import tempfile

    sys.path.insert(0, str(Path(__file__).parent.parent / "python"))
    made = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as where:
            made[name] = golden(write(Path(where), name), name)
        print(name, made[name][0][:3])
    GOLDENS.write_text(json.dumps(made) + "\n")
