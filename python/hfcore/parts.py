"""Content blocks that are no text -> OpenAI's content parts: images, audio, video, files.

For servers alone; a model in this process reads text. Blocks may be LangChain's own (both
versions), Anthropic's or OpenAI's. Nothing is fetched, nor checked that the server checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import InvalidRequestError

_AS_THEY_ARE = ("input_audio", "image_url", "audio_url", "video_url")
_MEDIA = ("image", "audio", "video", "file", "document", "text-plain")
_AUDIO_FORMATS = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav", "x-flac": "flac", "mp4": "m4a"}

KINDS = (*_AS_THEY_ARE, *_MEDIA)
"""Types of blocks that become parts."""


def part(block: Mapping[str, Any], position: int) -> dict[str, Any]:
    """A block of one of these KINDS as a part; `position`: of its message, for the error.

    Raises InvalidRequestError for one that holds nothing, or what the API has no form for.

    >>> part({"type": "image", "base64": "aGk=", "mime_type": "image/png"}, 0)
    {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,aGk='}}
    """
    kind = block["type"]
    if kind in _AS_THEY_ARE:
        return _as_it_is(block, position)
    if kind == "file" and isinstance(block.get("file"), Mapping):
        return {"type": "file", "file": dict(block["file"])}
    source = _Source.of(block)
    kind = "file" if kind in ("document", "text-plain") else kind
    made: dict[str, Any] | None = _MAKERS[kind](source)
    if made is None:
        raise InvalidRequestError(
            f"message {position}: {_LACKS[kind]}, got a block of {', '.join(map(repr, block))}"
        )
    return made


def _as_it_is(block: Mapping[str, Any], position: int) -> dict[str, Any]:
    """OpenAI's own part, less what LangChain notes in it; a bare URL gets its dict."""
    kind = block["type"]
    value = block.get(kind)
    if isinstance(value, str):
        value = {"url": value}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"message {position}: a block of type {kind!r} must hold {kind!r}, got {value!r:.100}"
        )
    return {"type": kind, kind: dict(value)}


class _Source:
    """Where a block's bytes are: in it, at a URL, or at the provider."""

    def __init__(self, data: Any, url: Any, file_id: Any, mime: Any, extra: Mapping[str, Any]):
        self.data, self.url, self.file_id = data, url, file_id
        self.mime = mime if isinstance(mime, str) else ""
        self.extra = extra

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> _Source:
        inner = block.get("source")  # Anthropic's
        if isinstance(inner, Mapping):
            return cls(inner.get("data"), inner.get("url"), inner.get("file_id"),
                       inner.get("media_type"), block)  # fmt: skip
        data = block.get("base64", block.get("data"))
        identity = block.get("file_id")
        if block.get("source_type") == "id":
            identity = block.get("id")
        more = {**(block.get("extras") or {}), **(block.get("metadata") or {}), **block}
        return cls(data, block.get("url"), identity, block.get("mime_type"), more)

    def link(self, mime: str) -> str | None:
        """A URL, of data if need be."""
        if isinstance(self.url, str):
            return self.url
        return self.inline(mime)

    def inline(self, mime: str) -> str | None:
        """Data as a URL."""
        if not isinstance(self.data, str):
            return None
        return f"data:{self.mime or mime};base64,{self.data}"


def _image(source: _Source) -> dict[str, Any] | None:
    url = source.link("image/jpeg")
    if url is None:
        return None
    detail = source.extra.get("detail")
    about = {"detail": detail} if isinstance(detail, str) else {}
    return {"type": "image_url", "image_url": {"url": url, **about}}


def _audio(source: _Source) -> dict[str, Any] | None:
    if isinstance(source.data, str):
        kind = source.mime.partition("/")[2] or "wav"
        form = _AUDIO_FORMATS.get(kind, kind)
        return {"type": "input_audio", "input_audio": {"data": source.data, "format": form}}
    url = source.link("audio/wav")
    return None if url is None else {"type": "audio_url", "audio_url": {"url": url}}


def _video(source: _Source) -> dict[str, Any] | None:
    url = source.link("video/mp4")
    return None if url is None else {"type": "video_url", "video_url": {"url": url}}


def _file(source: _Source) -> dict[str, Any] | None:
    if isinstance(source.file_id, str):
        return {"type": "file", "file": {"file_id": source.file_id}}
    data = source.inline("application/pdf")
    if data is None:
        return None
    name = source.extra.get("filename", source.extra.get("name", source.extra.get("title")))
    named = {"filename": name} if isinstance(name, str) else {"filename": "file"}
    return {"type": "file", "file": {**named, "file_data": data}}


_MAKERS = {"image": _image, "audio": _audio, "video": _video, "file": _file}
_LACKS = {
    "image": "an image must be a URL or base64",
    "audio": "audio must be base64 or a URL",
    "video": "a video must be a URL or base64",
    "file": "a file must be base64 or a file_id (chat completions take no URL of one)",
}
