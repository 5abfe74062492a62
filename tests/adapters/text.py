"""What the text cases ask of an adapter: templates and tokenizers, through the public API."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import hfcore
from hfcore import _core

_now: datetime | None = None


def set_now(iso: str) -> None:
    """Freeze the clock that templates read."""
    global _now
    _now = datetime.fromisoformat(iso)


@functools.lru_cache(maxsize=4)
def _template(source: str) -> hfcore.ChatTemplate:
    return hfcore.ChatTemplate(source)


def render(template: str, messages: Any, tools: Any = None, **kwargs: Any) -> str:
    """The text, as apply_chat_template gives it."""
    return _template(template).render(messages, tools=tools, now=_now, **kwargs)


def render_raw(template: str, messages: Any, tools: Any = None, **kwargs: Any) -> str:
    """The text with the keys whose value is None."""
    return _template(template).render(
        messages, tools=tools, now=_now, keep_none_keys=True, **kwargs
    )


def render_generation(
    template: str, messages: Any, tools: Any = None, **kwargs: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text and the spans of its generation blocks."""
    return _template(template).render_with_spans(
        messages, tools=tools, now=_now, keep_none_keys=True, **kwargs
    )


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str) -> _core.Tokenizer:
    return hfcore.Tokenizer.from_path(path)


def encode(path: str, text: str) -> list[int]:
    """Ids without special tokens."""
    return [int(i) for i in _tokenizer(path).encode(text, add_special_tokens=False)]


def encode_special(path: str, text: str) -> list[int]:
    """Ids with them."""
    return [int(i) for i in _tokenizer(path).encode(text, add_special_tokens=True)]


def decode(path: str, ids: Sequence[int]) -> str:
    """Text, special tokens included."""
    return _tokenizer(path).decode(ids, skip_special_tokens=False)


def offsets(path: str, text: str) -> list[tuple[int, int]]:
    """Spans in code points."""
    return _tokenizer(path).offsets(text)
