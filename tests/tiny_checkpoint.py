"""Checkpoints and LoRA adapters of noise, written as transformers and PEFT write them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hfcore.testing import CHATML

Tensors = dict[str, NDArray[np.float32]]

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 128, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 256 + len(SPECIALS)
OUTPUTS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH), "mlp.down_proj": (WIDTH, FFN),
}  # fmt: skip
"""The linear layers of a block: outputs and inputs."""


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """As the safetensors library does, float32 alone."""
    header: dict[str, Any] = {}
    body = b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor, "<f4").tobytes()
        place = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        body += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)


def weights(model_type: str = "llama", seed: int = 0) -> Tensors:
    """A model's tensors under transformers' names."""
    random = np.random.default_rng(seed)

    def noise(rows: int, columns: int) -> NDArray[np.float32]:
        scale = np.float32(columns**-0.5)
        matrix: NDArray[np.float32] = random.standard_normal((rows, columns), np.float32) * scale
        return matrix

    tensors: Tensors = {
        "model.embed_tokens.weight": noise(VOCAB, WIDTH) * 4,
        "model.norm.weight": np.ones(WIDTH, np.float32),
        "lm_head.weight": noise(VOCAB, WIDTH) * 2,
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors[f"{at}.input_layernorm.weight"] = np.ones(WIDTH, np.float32)
        tensors[f"{at}.post_attention_layernorm.weight"] = np.ones(WIDTH, np.float32)
        for name, (outputs, inputs) in OUTPUTS.items():
            tensors[f"{at}.{name}.weight"] = noise(outputs, inputs)
        if model_type == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{at}.self_attn.{name}.weight"] = np.ones(HEAD_DIM, np.float32)
    return tensors


def write_checkpoint(
    directory: Path,
    tensors: Tensors,
    model_type: str = "llama",
    chat_template: str | None = CHATML,
) -> Path:
    """A directory that transformers and hfcore both open."""
    directory.mkdir(parents=True, exist_ok=True)
    kinds = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config = {
        "architectures": [kinds[model_type]],
        "model_type": model_type,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "float32",
        "eos_token_id": VOCAB - 1,
        "bos_token_id": VOCAB - 3,
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", tensors)
    tokenizer().save(str(directory / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIALS[2],
        "bos_token": SPECIALS[0],
        "pad_token": SPECIALS[0],
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        about["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    return directory


def tokenizer() -> Tokenizer:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return made


class Lora:
    """An adapter of noise: its files, and what they add to a model's weights."""

    def __init__(
        self,
        targets: Sequence[str] = tuple(OUTPUTS),
        *,
        rank: int = 4,
        alpha: float = 16,
        seed: int = 1,
        layers: Sequence[int] = range(LAYERS),
        ranks: Mapping[str, int] | None = None,
        alphas: Mapping[str, float] | None = None,
        rslora: bool = False,
    ) -> None:
        random = np.random.default_rng(seed)
        self.tensors: Tensors = {}
        self.config: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
            "target_modules": sorted({name.split(".")[-1] for name in targets}), "bias": "none",
            "use_rslora": rslora, "use_dora": False, "fan_in_fan_out": False,
            "rank_pattern": dict(ranks or {}), "alpha_pattern": dict(alphas or {}),
            "layers_to_transform": list(layers), "modules_to_save": None, "lora_dropout": 0.05,
            "inference_mode": True, "init_lora_weights": True, "megatron_core": "megatron.core",
        }  # fmt: skip
        self._added: Tensors = {}
        for layer in layers:
            for name in targets:
                outputs, inputs = OUTPUTS[name]
                last = name.split(".")[-1]
                r, a = (ranks or {}).get(last, rank), (alphas or {}).get(last, alpha)
                down = random.standard_normal((r, inputs), np.float32) * np.float32(inputs**-0.5)
                up = random.standard_normal((outputs, r), np.float32) * np.float32(0.1)
                module = f"model.layers.{layer}.{name}"
                self.tensors[f"base_model.model.{module}.lora_A.weight"] = down
                self.tensors[f"base_model.model.{module}.lora_B.weight"] = up
                scale = np.float32(a / (r**0.5 if rslora else r))
                self._added[f"{module}.weight"] = up @ down * scale

    def write(self, directory: Path) -> Path:
        """The directory as `save_pretrained` makes it."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config))
        write_safetensors(directory / "adapter_model.safetensors", self.tensors)
        return directory

    def merged(self, tensors: Tensors) -> Tensors:
        """A model's weights with what it adds."""
        return tensors | {name: tensors[name] + more for name, more in self._added.items()}
