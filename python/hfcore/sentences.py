"""Embedders: texts to vectors, as sentence-transformers' files say, without torch.

The work is done by the compiled `hfcore._core.Encoder`; here are modules.json and what it names.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _core, hub, options
from .engine import LoadBar
from .errors import InvalidRequestError, ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
# In the order in which sentence-transformers puts several side by side.
_POOLINGS = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
_MOST_JSON = 16 << 20
_QUERY = ("query",)
_DOCUMENT = ("document", "passage", "corpus")
"""The prompts that sentence-transformers takes, the first that a model has."""


class SentenceEncoder:
    """A model that makes one vector of a text: an encoder (BERT's kind), or a decoder (qwen3).

    Args:
        model: a directory, or "owner/name".
        device: "cpu", or "reference" (float32, slow, exact).
        threads: None: one for each core that this process may use.
        max_tokens: what is beyond is cut off; None: as the model's files say.
        prompts: texts put before, by name; None: as the model's files say.
        default_prompt_name: which of them a call takes that names none.
        pooling: "cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", or some
            of them with "+" between; None: as the model's files say, else "mean".
        normalize: whether vectors have unit length; None: as the model's files say, else not.
        revision, cache_dir, token, local_files_only: which files of the hub.

    Raises ModelNotFoundError, ModelFileError, UnsupportedModelError for a family or a module of
    sentence-transformers that is not known. Source: sentence-transformers' documentation of
    modules.json (Reimers and Gurevych 2019, arXiv:1908.10084).

    >>> import tempfile
    >>> from hfcore.testing import tiny_encoder
    >>> encoder = SentenceEncoder(tiny_encoder(tempfile.mkdtemp()))
    >>> encoder.encode(["a text", "another"]).shape
    (2, 32)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_tokens: int | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: Any = None,
        local_files_only: bool | None = None,
    ) -> None:
        self.model = os.fspath(model)
        self.path = hub.resolve(
            model, revision=revision, cache_dir=cache_dir, token=token,
            local_files_only=local_files_only,
        )  # fmt: skip
        files = _Files(self.path)
        self.pooling = pooling or files.pooling
        self.normalize = files.normalize if normalize is None else normalize
        self.prompts = dict(files.prompts if prompts is None else prompts)
        self.default_prompt_name = default_prompt_name or files.default_prompt_name
        self._prompt(None, self.default_prompt_name)
        self._counts_prompts = files.counts_prompts
        with contextlib.closing(LoadBar()) as bar:
            self._encoder = _core.Encoder(
                self.path, device=options.device(device), threads=threads,
                max_tokens=max_tokens or files.max_tokens, pooling=self.pooling,
                dense=[self.path / name for name in files.dense], progress=bar.shown(),
            )  # fmt: skip

    def query_prompt(self) -> str | None:
        """The name of the model's own prompt for questions, if it has one."""
        return next((name for name in _QUERY if name in self.prompts), None)

    def document_prompt(self) -> str | None:
        """The same for what is searched."""
        return next((name for name in _DOCUMENT if name in self.prompts), None)

    @property
    def info(self) -> dict[str, Any]:
        """What was loaded: architecture, width (numbers of a vector), max_tokens."""
        return self._encoder.info

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> NDArray[np.float32]:
        """A vector for each text: float32, [texts, width].

        `prompt` or `prompt_name`: what is put before each text. `normalize` None: as the encoder
        was made. `truncate_dim`: so many numbers of each vector, cut before they get unit length.
        `progress` is called with texts done and in all; what it raises ends the work.

        >>> import tempfile
        >>> from hfcore.testing import tiny_encoder
        >>> encoder = SentenceEncoder(tiny_encoder(tempfile.mkdtemp()))
        >>> vectors = encoder.encode(["a text"], normalize=True, truncate_dim=8)
        >>> vectors.shape, round(float((vectors**2).sum()), 3)
        ((1, 8), 1.0)
        """
        if isinstance(texts, str):
            raise InvalidRequestError("texts must be a list of str, got a str")
        before = self._prompt(prompt, prompt_name or self.default_prompt_name)
        width = self.info["width"]
        if truncate_dim is not None and not 1 <= truncate_dim <= width:
            raise InvalidRequestError(f"truncate_dim must be from 1 to {width}, got {truncate_dim}")
        unit = self.normalize if normalize is None else normalize
        vectors = self._encoder.embed(
            [before + text for text in texts] if before else list(texts),
            normalize=unit, left_out="" if self._counts_prompts else before, progress=progress,
        )  # fmt: skip
        if truncate_dim is None or truncate_dim == width:
            return vectors
        vectors = vectors[:, :truncate_dim]
        if not unit:
            return vectors
        lengths: Any = (vectors**2).sum(axis=1, keepdims=True) ** 0.5
        shortened: NDArray[np.float32] = vectors / lengths.clip(1e-12)
        return shortened

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None or name is None:
            return prompt or ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise InvalidRequestError(f"prompt_name {name!r} is not one of the model's: {known}")
        return self.prompts[name]


class _Files:
    """What sentence-transformers' files beside a model say; without them, its defaults."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pooling, self.normalize, self.counts_prompts = "mean", False, True
        self.dense: list[str] = []
        for module in self._list("modules.json"):
            self._read_module(module)
        bert = self._object("sentence_bert_config.json")
        length = bert.get("max_seq_length")
        self.max_tokens = length if isinstance(length, int) and length > 0 else None
        if bert.get("do_lower_case"):
            raise UnsupportedModelError(
                "unsupported do_lower_case of sentence_bert_config.json; tokenizers do it",
                what="option", name="do_lower_case",
            )  # fmt: skip
        config = self._object("config_sentence_transformers.json")
        prompts = config.get("prompts") or {}
        if not isinstance(prompts, dict):
            raise self._wrong("config_sentence_transformers.json", "prompts by name", prompts)
        self.prompts = {str(name): str(text) for name, text in prompts.items()}
        self.default_prompt_name = config.get("default_prompt_name")

    def _read_module(self, module: dict[str, Any]) -> None:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _MODULES:
            raise UnsupportedModelError(
                f"unsupported module {kind!r} of modules.json; supported: " + ", ".join(_MODULES),
                what="module", name=kind,
            )  # fmt: skip
        if self.normalize and kind != "Normalize":
            raise UnsupportedModelError(
                f"unsupported module {kind!r} after Normalize; supported: Normalize as the last",
                what="module", name=kind,
            )  # fmt: skip
        if kind == "Normalize":
            self.normalize = True
        elif kind != "Transformer":
            path = self._inside(str(module.get("path", "")))
            if kind == "Dense":
                self.dense.append(path)
            else:
                self._read_pooling(path)

    def _read_pooling(self, name: str) -> None:
        config = self._object(f"{name}/config.json")
        self.counts_prompts = config.get("include_prompt", True) is not False
        mode = config.get("pooling_mode")
        if isinstance(mode, str):
            self.pooling = mode
            return
        chosen = [ours for key, ours in _POOLINGS.items() if config.get(f"pooling_mode_{key}")]
        if not chosen:
            wanted = "a pooling_mode, one of " + ", ".join(_POOLINGS)
            raise self._wrong(f"{name}/config.json", wanted, mode)
        self.pooling = "+".join(chosen)

    def _inside(self, name: str) -> str:
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise self._wrong("modules.json", "a path below the model's", name)
        return name

    def _list(self, name: str) -> list[dict[str, Any]]:
        found = self._json(name)
        if found is None:
            return []
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise self._wrong(name, "a list of objects", found)
        return found

    def _object(self, name: str) -> dict[str, Any]:
        found = self._json(name)
        if found is not None and not isinstance(found, dict):
            raise self._wrong(name, "an object", found)
        return found or {}

    def _json(self, name: str) -> Any:
        path = self._folder / name
        if not path.is_file():
            return None
        with path.open("rb") as file:
            text = file.read(_MOST_JSON + 1)
        if len(text) > _MOST_JSON:
            raise ModelFileError(f"{path}: larger than {_MOST_JSON} bytes", path=str(path))
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"{path}: not JSON: {error}", path=str(path)) from error

    def _wrong(self, name: str, wanted: str, got: Any) -> ModelFileError:
        path = self._folder / name
        return ModelFileError(f"{path}: wanted {wanted}, got {got!r:.200}", path=str(path))
