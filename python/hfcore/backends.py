"""Where completions come from, as the LangChain classes see it: Backend, and Local below it.

`remote.Remote`, `placement.Placed` and `transformers_backend.Transformers` are the others.

The fallback for strict templates is here too. Some chat templates refuse a system message, or two
turns of one role in a row. When a template itself refuses (and only then), the messages are tried
again with neighbours of one role merged, and then with system text folded into the user turn after
it. `Engine` never does this: there a refusal is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .engine import Delta, Engine, Prompt, SharedEngine, shared_engine
from .errors import TemplateError

Message = dict[str, Any]
T = TypeVar("T")


class Deltas(Iterator[Delta], Protocol):
    """An iterator of deltas; closing it cancels the request."""

    def close(self) -> None:
        """Cancel, unless it has ended."""


class Backend(Protocol):
    """Something that completes prompts. A prompt is a str, or a list of OpenAI-shaped messages."""

    @property
    def model_name(self) -> str:
        """The model as its user calls it."""

    def stream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> Deltas:
        """Submit now, then iterate. Closing the iterator cancels."""

    def astream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> AsyncGenerator[Delta, None]:
        """The same for an event loop."""

    def token_ids(self, text: str) -> list[int]:
        """A text's tokens, without special ones around it."""

    def count_tokens(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> int:
        """The tokens that a prompt takes, its template included."""

    def identity(self) -> dict[str, Any]:
        """What two backends differ in when their answers may."""

    @property
    def context_size(self) -> int | None:
        """Most tokens of a prompt and its answer; None while that is unknown."""

    @property
    def takes_parts(self) -> bool:
        """Whether a message's content may be a list of OpenAI's content parts: images and so on."""

    def sibling(self, model: str) -> Backend:
        """The same kind of backend for another model."""


@dataclass
class Local:
    """A model in this process, opened at first use and shared (see `SharedEngine`)."""

    engine: SharedEngine

    takes_parts = False

    @property
    def model_name(self) -> str:
        """See `Backend`, as for all of these."""
        return self.engine.model

    def stream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> Deltas:
        """Open the model if need be, submit, iterate."""
        engine = self.engine.get()
        request = dict(options) | ({"tools": list(tools)} if tools else {})
        return first_accepted(prompt, lambda shape: engine.stream(shape, **request))

    async def astream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> AsyncGenerator[Delta, None]:
        """The same; opening happens in a thread."""
        request = dict(options) | ({"tools": list(tools)} if tools else {})
        engine = await self._opened()
        shapes = _Shapes(prompt)
        while True:
            deltas = engine.astream(shapes.current, **request)
            async with contextlib.aclosing(deltas):
                try:
                    async for delta in deltas:
                        yield delta
                    return
                except TemplateError as error:  # rendering comes before the first delta
                    shapes.refused(error)

    def token_ids(self, text: str) -> list[int]:
        """By the model's tokenizer, special ones not added."""
        ids = self.engine.get().tokenizer.encode(text, add_special_tokens=False)
        return [int(i) for i in ids]

    def count_tokens(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> int:
        """Of the rendered prompt."""
        if isinstance(prompt, str):
            return len(self.token_ids(prompt))
        engine = self.engine.get()
        given = {"tools": list(tools)} if tools else {}
        text = first_accepted(prompt, lambda shape: engine.render(shape, **given))
        return len(self.token_ids(text))

    def identity(self) -> dict[str, Any]:
        """Files and how they are opened."""
        return self.engine.identity()

    @property
    def context_size(self) -> int | None:
        """As it was asked for, or of the open engine; opens nothing."""
        if self.engine.loaded:
            known = self.engine.get().info.get("context_size")
            return known if isinstance(known, int) else None
        return self.engine.options.get("context_size")

    def sibling(self, model: str) -> Local:
        """Another model, opened the same way."""
        theirs = ("revision", "quantization", "chat_template")
        kept = {n: v for n, v in self.engine.options.items() if n not in theirs}
        return Local(shared_engine(model, **kept))

    async def _opened(self) -> Engine:
        if self.engine.loaded:
            return self.engine.get()
        import asyncio

        return await asyncio.to_thread(self.engine.get)


def first_accepted(prompt: Prompt, attempt: Callable[[Prompt], T]) -> T:
    """The attempt with the first shape of the messages that the template does not refuse."""
    shapes = _Shapes(prompt)
    while True:
        try:
            return attempt(shapes.current)
        except TemplateError as error:
            shapes.refused(error)


class _Shapes:
    """The shapes of one prompt: as given, merged, folded. The first refusal is the one reported."""

    def __init__(self, prompt: Prompt) -> None:
        self.current = prompt
        self._first: TemplateError | None = None
        self._next: list[Callable[[list[Message]], list[Message]]] = [merged, folded]

    def refused(self, error: TemplateError) -> None:
        """On to the next shape that differs; raises the first error when there is none."""
        self._first = self._first or error
        while error.thrown and isinstance(self.current, list) and self._next:
            shape = self._next.pop(0)(self.current)
            if shape != self.current:
                self.current = shape
                return
        raise self._first


def merged(messages: list[Message]) -> list[Message]:
    r"""Neighbours of one role as one message, their texts a blank line apart; tool results stay.

    >>> merged([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    [{'role': 'user', 'content': 'a\n\nb'}]
    """
    result: list[Message] = []
    for message in messages:
        if result and message["role"] == result[-1]["role"] != "tool":
            result[-1] = _joined(result[-1], message)
        else:
            result.append(message)
    return result


def folded(messages: list[Message]) -> list[Message]:
    r"""No system messages: each one's text opens the user turn after it.

    Where no user turn follows, it becomes one. Neighbours are merged again.

    >>> folded([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': 'Be brief.\n\nHi'}]
    """
    result: list[Message] = []
    waiting: list[Message] = []
    for message in messages:
        if message["role"] in ("system", "developer"):
            waiting.append(message)
        elif message["role"] == "user" and waiting:
            result.append(_with_text_before(waiting, message))
            waiting = []
        else:
            result.append(message)
    if waiting:
        result.append({"role": "user", "content": _texts(waiting)})
    return merged(result)


def _joined(one: Message, other: Message) -> Message:
    result = {**one, **other, "content": _texts([one, other])}
    calls = [*one.get("tool_calls", ()), *other.get("tool_calls", ())]
    if calls:
        result["tool_calls"] = calls
    return result


def _with_text_before(system: list[Message], message: Message) -> Message:
    return {**message, "content": _texts([*system, message])}


def _texts(messages: Sequence[Message]) -> str:
    return "\n\n".join(m["content"] for m in messages if m.get("content"))
