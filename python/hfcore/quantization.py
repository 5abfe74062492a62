"""Model files in other types: what `hfcore quantize` does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import _core, hub
from .engine import Engine, LoadBar

CONTEXT = 512
"""Tokens of a text that are judged together."""


@dataclass(frozen=True)
class Quantized:
    """A file that was written, and what it cost: bytes of all tensors before and after."""

    path: Path
    tensors: int
    bytes_before: int
    bytes: int


def quantize(
    model: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    imatrix: str | os.PathLike[str] | None = None,
    allow_requantize: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Quantized:
    """Write a GGUF model in other types, as one file that llama.cpp loads too.

    `model`: a GGUF file in F32, F16, BF16 or Q8_0 (or owner/name of one). `to`: a mixture as files
    are named, in any case: "q4_k_m", "q8_0"; which tensors a mixture keeps better is llama.cpp's
    rule. `allow_requantize`: also a model that is quantised already, whose errors then add up.
    `imatrix`: a GGUF file of llama-imatrix, that says which inputs count for more. `progress`
    is called with bytes done and in all; what it raises ends the work; None: a bar on a terminal.

    Raises ModelNotFoundError, ModelFileError, UnsupportedModelError for an unknown mixture or a
    model that is quantised already.

    >>> import tempfile
    >>> from hfcore.testing import tiny_model
    >>> directory = tempfile.mkdtemp()
    >>> done = quantize(tiny_model(directory), "q4_0", directory + "/small.gguf")
    >>> done.bytes < done.bytes_before
    True
    """
    source = hub.resolve(model)
    with contextlib.closing(LoadBar()) as bar:
        made = _core.quantize_file(
            source, to, out, threads=threads, importance=imatrix, again=allow_requantize,
            progress=progress or bar.shown(),
        )  # fmt: skip
    return Quantized(Path(out), made["tensors"], made["bytes_before"], made["bytes"])


def mean_nll(model: str | os.PathLike[str], text: str, *, threads: int | None = None) -> float:
    """Mean negative log-likelihood of a text's tokens, in nats, in windows of 512 tokens.

    >>> import tempfile
    >>> from hfcore.testing import tiny_model
    >>> 5 < mean_nll(tiny_model(tempfile.mkdtemp()), "A tiny model knows nothing of words.") < 7
    True
    """
    total, count = 0.0, 0
    with Engine(model, threads=threads, max_sequences=1) as engine:
        most = min(CONTEXT, engine.info["context_size"]) - 1
        ids = [int(token) for token in engine.tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, most):
            window = ids[start : start + most]
            if len(window) < 2:
                break
            done = engine.generate(window, max_tokens=1, prompt_logprobs=True)
            for token in done.prompt_logprobs or ():
                total -= token.logprob
                count += 1
    return total / max(1, count)
