"""HuggingFaceEmbeddings: LangChain's embeddings from a model in this process, without torch.

Names and arguments are those of langchain-huggingface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr

from . import options
from .engine import LoadBar
from .errors import InvalidRequestError
from .sentences import SentenceEncoder

_OPENING = ("device", "threads", "max_tokens", "prompts", "default_prompt_name", "revision",
            "token", "local_files_only", "pooling", "normalize", "truncate_dim",
            "trust_remote_code", "backend")  # fmt: skip
_ENCODING = ("prompt", "prompt_name", "normalize_embeddings", "truncate_dim", "batch_size",
             "show_progress_bar", "precision", "convert_to_numpy", "output_value")  # fmt: skip
_ONLY = {
    "precision": ("float32",), "output_value": ("sentence_embedding",), "backend": ("torch",),
    "convert_to_numpy": (True, False), "trust_remote_code": (False, None),
}  # fmt: skip


class HuggingFaceEmbeddings(BaseModel, Embeddings):
    """A sentence encoder as LangChain's embeddings.

    Args:
        model_name (or model): a directory, or "owner/name".
        cache_folder: where files of the hub are kept; None: as everybody keeps them.
        model_kwargs: how to open it: device, threads, max_tokens, prompts, default_prompt_name,
            pooling, normalize, truncate_dim, revision, token, local_files_only (see
            `SentenceEncoder`).
        encode_kwargs: of every text: prompt or prompt_name, normalize_embeddings, truncate_dim,
            batch_size (texts that are handed over at a time), show_progress_bar.
        query_encode_kwargs: the same for queries; empty: encode_kwargs.
        multi_process: False; True raises: threads do what processes would.
        show_progress: a bar on a terminal.

    Where these name no prompt, a model's own for queries and documents are taken, as
    sentence-transformers' encode_query and encode_document do; `prompt=""` is none. Line ends in
    texts become spaces, as there. Unknown names raise UnknownOptionError. `encoder` gives numpy
    arrays.

    >>> import tempfile
    >>> from hfcore.testing import tiny_encoder
    >>> embeddings = HuggingFaceEmbeddings(model=str(tiny_encoder(tempfile.mkdtemp())))
    >>> len(embeddings.embed_query("a text"))
    32
    """

    model_name: str = Field(default="sentence-transformers/all-mpnet-base-v2", alias="model")
    cache_folder: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    encode_kwargs: dict[str, Any] = Field(default_factory=dict)
    query_encode_kwargs: dict[str, Any] = Field(default_factory=dict)
    multi_process: bool = False
    show_progress: bool = False

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    _encoder: SentenceEncoder = PrivateAttr()
    _truncate_dim: int | None = PrivateAttr(default=None)

    def __init__(self, **kwargs: Any) -> None:
        known = (*type(self).model_fields, "model")
        options.canonical({n: v for n, v in kwargs.items() if n not in known}, known)
        super().__init__(**kwargs)
        if self.multi_process:
            raise InvalidRequestError("multi_process: threads= in model_kwargs does its work here")
        opening = _checked(self.model_kwargs, _OPENING)
        if isinstance(opening.get("token"), str):
            opening["token"] = SecretStr(opening["token"])
            self.model_kwargs = {**self.model_kwargs, "token": opening["token"]}
        self._truncate_dim = opening.pop("truncate_dim", None)
        _checked(self.encode_kwargs, _ENCODING)
        _checked(self.query_encode_kwargs, _ENCODING)
        self._encoder = SentenceEncoder(self.model_name, cache_dir=self.cache_folder, **opening)

    @property
    def encoder(self) -> SentenceEncoder:
        """What makes the vectors."""
        return self._encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text."""
        return self._embed(texts, self.encode_kwargs, self._encoder.document_prompt())

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        given = self.query_encode_kwargs or self.encode_kwargs
        return self._embed([text], given, self._encoder.query_prompt())[0]

    def _embed(
        self, texts: list[str], given: Mapping[str, Any], own_prompt: str | None
    ) -> list[list[float]]:
        asked = _checked(given, _ENCODING)
        if asked.get("prompt") is None and asked.get("prompt_name") is None:
            asked["prompt_name"] = own_prompt
        normalize = asked.pop("normalize_embeddings", None)
        size = asked.pop("batch_size", None) or max(1, len(texts))
        shown = asked.pop("show_progress_bar", None) or self.show_progress
        asked.setdefault("truncate_dim", self._truncate_dim)
        texts = [text.replace("\n", " ") for text in texts]
        vectors: list[list[float]] = []
        with contextlib.closing(LoadBar(doing="embedding", unit="texts", each=1)) as bar:
            for start in range(0, len(texts), size):
                found = self._encoder.encode(
                    texts[start : start + size], normalize=normalize,
                    progress=bar.shown() if shown else None, **asked,
                )  # fmt: skip
                vectors += found.tolist()
        return vectors


def _checked(given: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Options by their names, those that can only be said in one way left out."""
    named = options.canonical(dict(given), known)
    for name, values in _ONLY.items():
        if name in named and named.pop(name) not in values:
            raise InvalidRequestError(
                f"{name} must be {' or '.join(map(repr, values))} here, got {given[name]!r}"
            )
    return named
