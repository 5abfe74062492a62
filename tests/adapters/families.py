"""What the family cases ask: logits, greedy tokens, text; on HFCORE_CASE_DEVICE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

import hfcore
from hfcore import _core

DEVICE = os.environ.get("HFCORE_CASE_DEVICE", "cpu")


class Model:
    """One checkpoint."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.engine = hfcore.Engine(path, device=DEVICE, max_sequences=1)

    def logits(self, ids: list[int]) -> Any:
        return self.engine.logits(ids, last_only=False)

    def greedy(self, ids: list[int], n: int) -> list[int]:
        done = self.engine.generate(ids, max_tokens=n, temperature=0, ignore_eos=True)
        return list(done.token_ids)

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        ids = self.engine.tokenizer.encode(text, add_special_tokens=add_special)
        return [int(i) for i in ids]

    def weight(self, name: str) -> Any:
        return _core.read_tensor(self.path, name)

    def chat(self, messages: Any) -> str:
        template = self.engine.chat_template
        assert template is not None
        return template.render(messages, add_generation_prompt=True)


class Encoder:
    """One checkpoint that gives vectors."""

    def __init__(self, path: str) -> None:
        self.encoder = hfcore.SentenceEncoder(path, device=DEVICE)
        self.tokenizer = hfcore.Tokenizer.from_path(path)

    def embed(self, text: str) -> Any:
        return self.encoder.encode([text])[0]

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=add_special)]


def load(path: str, **_: Any) -> Model | Encoder:
    return Encoder(path) if (Path(path) / "modules.json").exists() else Model(path)


def dequantize(name: str, blocks: Any) -> Any:
    return np.asarray(_core.dequantize(name, blocks))
