"""What comes after the model in `with_structured_output`: its answer as the object asked for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser, JsonOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import RunnableGenerator
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict, TypeAdapter
from typing_extensions import is_typeddict, override

METHODS = ("json_schema", "function_calling", "json_mode")

_JSON = JsonOutputParser()


class Reader:
    """An answer -> the object. `tool`: the name of the tool whose arguments it is; else its text.

    `schema`: a pydantic class (1 or 2) or a dataclass gives its instance; anything else a dict.
    """

    def __init__(self, schema: Any = None, tool: str | None = None) -> None:
        self.tool = tool
        self._name = getattr(schema, "__name__", "an object")
        self._instance = _maker(schema)

    def parsed(self, message: BaseMessage, *, partial: bool = False) -> Any:
        """The object. None: a call of another tool; or, `partial`, not enough of it yet.

        Raises OutputParserException.
        """
        found, value = self._arguments(message) if self.tool else self._text(message, partial)
        if not found:
            return None
        try:
            return self._instance(value)
        except ValueError as error:  # pydantic's ValidationErrors are
            if partial:
                return None
            raise OutputParserException(
                f"the answer is no {self._name}: {error}", llm_output=str(value)
            ) from error

    def _arguments(self, message: BaseMessage) -> tuple[bool, Any]:
        calls = message.tool_calls if isinstance(message, AIMessage) else []
        args = [call["args"] for call in calls if call["name"] == self.tool]
        return bool(args), args[0] if args else None

    def _text(self, message: BaseMessage, partial: bool) -> tuple[bool, Any]:
        if isinstance(message, AIMessage) and message.tool_calls:
            return False, None
        value = _JSON.parse_result([Generation(text=str(message.text))], partial=partial)
        return not (partial and value is None), value

    def complete(self, message: BaseMessage) -> Any:
        """As `parsed`, when no more will come: an answer that was cut is no object."""
        if message.response_metadata.get("finish_reason") == "length" and not self._whole(message):
            raise OutputParserException(
                "the answer was cut before it was complete, by max_tokens or the context's size",
                llm_output=str(message.text),
            )
        return self.parsed(message)

    def _whole(self, message: BaseMessage) -> bool:
        """Whether what was written is JSON to its end; core's parsers also take the half of one."""
        calls = getattr(message, "tool_calls", [])
        chunks = getattr(message, "tool_call_chunks", [])
        if self.tool is not None and not chunks:
            return bool(calls)  # of a whole message only whole calls are valid
        texts = [message.text] if self.tool is None else [chunk["args"] for chunk in chunks]
        try:
            for text in texts:
                json.loads(text or "")
        except ValueError:
            return False
        return True


class Parser(BaseCumulativeTransformOutputParser[Any]):
    """The runnable after the model: partial objects while it streams, then the whole one.

    Unlike core's parsers it raises at the end of a stream that gave no object.
    """

    reader: Reader

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @property
    def _type(self) -> str:
        return "hfcore-structured"

    @override
    def parse(self, text: str) -> Any:
        return self.reader.complete(AIMessage(text))

    @override
    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        first = result[0]
        message = first.message if isinstance(first, ChatGeneration) else AIMessage(first.text)
        return (
            self.reader.parsed(message, partial=True) if partial else self.reader.complete(message)
        )

    @override
    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:
        growing = _Growing(self.reader)
        for piece in input:
            yield from growing.add(piece)
        yield from growing.end()

    @override
    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:
        growing = _Growing(self.reader)
        async for piece in input:
            for value in growing.add(piece):
                yield value
        for value in growing.end():
            yield value


class _Growing:
    """An answer as it streams, and the last object it gave."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._message: Any = None
        self._last: Any = None

    def add(self, piece: str | BaseMessage) -> Iterator[Any]:
        """The object so far, if this piece changed it."""
        piece = AIMessageChunk(content=piece) if isinstance(piece, str) else piece
        self._message = piece if self._message is None else self._message + piece
        return self._changed(self._reader.parsed(self._message, partial=True))

    def end(self) -> Iterator[Any]:
        """The whole object, if it is not what came last."""
        if self._message is None:
            return iter(())
        return self._changed(self._reader.complete(self._message))

    def _changed(self, value: Any) -> Iterator[Any]:
        if value is not None and value != self._last:
            self._last = value
            yield value


def with_raw(reader: Reader) -> RunnableGenerator[Any, Any]:
    """The model's message beside the object: {"raw", "parsed", "parsing_error"}.

    In a stream "raw" comes in chunks, then the other two.
    """

    def read(pieces: Iterator[Any]) -> Iterator[Any]:
        whole: Any = None
        for piece in pieces:
            whole = piece if whole is None else whole + piece
            yield AddableDict(raw=piece)
        yield _judged(reader, whole)

    async def aread(pieces: AsyncIterator[Any]) -> AsyncIterator[Any]:
        whole: Any = None
        async for piece in pieces:
            whole = piece if whole is None else whole + piece
            yield AddableDict(raw=piece)
        yield _judged(reader, whole)

    return RunnableGenerator(read, aread, name="structured_output")


def _judged(reader: Reader, message: BaseMessage) -> AddableDict:
    try:
        return AddableDict(parsed=reader.complete(message), parsing_error=None)
    except OutputParserException as error:
        return AddableDict(parsed=None, parsing_error=error)


def _maker(schema: Any) -> Callable[[Any], Any]:
    """What turns a JSON value into what the schema promises."""
    if not isinstance(schema, type) or is_typeddict(schema):
        return lambda value: value
    if hasattr(schema, "model_validate"):
        return cast("Callable[[Any], Any]", schema.model_validate)
    if hasattr(schema, "parse_obj"):
        return cast("Callable[[Any], Any]", schema.parse_obj)
    return TypeAdapter(schema).validate_python
