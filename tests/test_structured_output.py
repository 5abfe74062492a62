"""with_structured_output: what is asked of the engine, and objects out of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.utils.function_calling import convert_to_json_schema
from pydantic import BaseModel, Field, field_validator
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import TypedDict

from hfcore import ChatHuggingFace, Delta, Usage
from hfcore.engine import ToolCall
from hfcore.errors import InvalidRequestError, UnknownOptionError
from hfcore.testing import Canned

Method = Literal["json_schema", "function_calling", "json_mode"]
METHODS: tuple[Method, ...] = ("json_schema", "function_calling", "json_mode")
TEXT = '{"city": "Oslo", "people": 709000}'
VALUE = {"city": "Oslo", "people": 709000}


class Place(BaseModel):
    """A place."""

    city: str = Field(description="its name")
    people: int


class PlaceV1(BaseModelV1):
    """A place."""

    city: str
    people: int


class PlaceDict(TypedDict):
    """A place."""

    city: str
    people: int


@dataclass
class PlaceData:
    """A place."""

    city: str
    people: int


SCHEMA: dict[str, Any] = {
    "title": "Place", "description": "A place.", "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
}  # fmt: skip
FUNCTION = {"name": "Place", "description": "A place.", "parameters": SCHEMA}

KINDS: list[tuple[Any, Any]] = [
    (Place, Place(city="Oslo", people=709000)),
    (PlaceV1, PlaceV1(city="Oslo", people=709000)),
    (PlaceDict, VALUE),
    (PlaceData, PlaceData("Oslo", 709000)),
    (SCHEMA, VALUE),
    (FUNCTION, VALUE),
    ({"type": "function", "function": FUNCTION}, VALUE),
    ({"type": "json_schema", "json_schema": {"name": "Place", "schema": SCHEMA}}, VALUE),
]


def canned(*answers: Any, **kwargs: Any) -> tuple[ChatHuggingFace, Canned]:
    chat = ChatHuggingFace(model="owner/canned", **kwargs)
    chat.llm._backend = backend = Canned(*answers, model_name="owner/canned")
    return chat, backend


def answer(method: str, name: str, text: str = TEXT) -> Any:
    return [ToolCall(0, "c1", name, text)] if method == "function_calling" else text


def name_of(schema: Any) -> str:
    return getattr(schema, "__name__", "Place")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("schema", "expected"), KINDS)
@pytest.mark.parametrize("version", ["v0", "v1"])
async def test_every_kind_of_schema_gives_its_object_by_every_method(
    schema: Any, expected: Any, method: Method, version: str
) -> None:
    chat, _ = canned(answer(method, name_of(schema)), output_version=version)
    model = chat.with_structured_output(schema, method=method)
    assert model.invoke("x") == expected
    assert await model.ainvoke("x") == expected
    assert list(model.stream("x"))[-1] == expected
    assert [o async for o in model.astream("x")][-1] == expected
    assert model.batch(["x", "y"]) == [expected] * 2


@pytest.mark.parametrize(("schema", "expected"), KINDS)
def test_the_schema_reaches_the_engine(schema: Any, expected: Any) -> None:
    chat, backend = canned(TEXT, [ToolCall(0, "c", name_of(schema), TEXT)])
    chat.with_structured_output(schema, max_tokens=9).invoke("x")
    chat.with_structured_output(schema, method="function_calling").invoke("x")
    _, no_tools, asked = backend.requests[0]
    assert no_tools is None
    assert set(asked) == {"response_format", "max_tokens"}
    held = asked["response_format"]["json_schema"]
    assert held["name"] == name_of(schema)
    assert set(held["schema"]["properties"]) == {"city", "people"}
    _, [tool], asked = backend.requests[1]
    assert set(tool["function"]["parameters"]["properties"]) == {"city", "people"}
    assert asked == {
        "tool_choice": {"type": "function", "function": {"name": name_of(schema)}},
        "parallel_tool_calls": False,
    }


@pytest.mark.parametrize("strict", [None, True, False])
def test_strict_goes_with_the_schema(strict: bool | None) -> None:
    chat, backend = canned(TEXT, [ToolCall(0, "c", "Place", TEXT)])
    chat.with_structured_output(Place, strict=strict).invoke("x")
    chat.with_structured_output(Place, method="function_calling", strict=strict).invoke("x")
    held = backend.requests[0][2]["response_format"]["json_schema"]
    function = backend.requests[1][1][0]["function"]
    assert held.get("strict") is function.get("strict") is strict
    for schema in (held["schema"], function["parameters"]):
        assert schema.get("additionalProperties") is (False if strict else None)


def test_json_mode_needs_no_schema_and_gives_a_dict() -> None:
    chat, backend = canned(TEXT)
    assert chat.with_structured_output(method="json_mode").invoke("x") == VALUE
    assert backend.requests[0][2] == {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"method": "json"}, InvalidRequestError, "json_schema, function_calling, json_mode, got"),
        ({"schema": None}, InvalidRequestError, "method='json_schema' needs a schema, got None"),
        ({"schema": 5}, InvalidRequestError, "a schema must be"),
        ({"method": "json_mode", "strict": True}, InvalidRequestError, "json_mode knows no schema"),
        ({"method": "json_mode", "tools": [SCHEMA]}, InvalidRequestError, "tools go with"),
        ({"includeraw": True}, UnknownOptionError, "includeraw"),
        ({"max_token": 5}, UnknownOptionError, "did you mean 'max_tokens'"),
        (
            {"schema": {"title": "L", "type": "array"}, "method": "function_calling"},
            InvalidRequestError,
            "type is 'array'",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_when_made(
    kwargs: dict[str, Any], error: type[Exception], words: str
) -> None:
    chat, _ = canned()
    with pytest.raises(error, match=words):
        chat.with_structured_output(**{"schema": Place, **kwargs})


def test_a_schema_need_not_be_an_object() -> None:
    chat, _ = canned("[1, 2, 3]")
    schema = {"title": "Numbers", "type": "array", "items": {"type": "integer"}}
    assert chat.with_structured_output(schema).invoke("x") == [1, 2, 3]


@pytest.mark.parametrize("method", METHODS)
def test_dicts_grow_as_they_are_streamed(method: Method) -> None:
    chat, _ = canned(answer(method, "Place", '{"city": "New York City", "people": 8}'))
    *growing, whole = chat.with_structured_output(SCHEMA, method=method).stream("x")
    assert len(growing) >= 1
    assert growing[0] != whole == {"city": "New York City", "people": 8}


def test_instances_are_streamed_once_they_are_complete() -> None:
    chat, _ = canned('{"city": "New York City", "people": 8}')
    objects = list(chat.with_structured_output(Place).stream("x"))
    assert objects == [Place(city="New York City", people=8)]


CUT = [Delta('{"city": "Os', (1,), None, "length", Usage(1, 1))]


@pytest.mark.parametrize("schema", [Place, PlaceDict, SCHEMA])
@pytest.mark.parametrize("method", METHODS)
async def test_an_answer_that_was_cut_raises(schema: Any, method: Method) -> None:
    call = [ToolCall(0, "c1", name_of(schema), '{"city": "Os')]
    cut_call = [Delta(tool_calls=tuple(call)), Delta(finish_reason="length", usage=Usage(1, 1))]
    chat, _ = canned(cut_call if method == "function_calling" else CUT)
    model = chat.with_structured_output(schema, method=method)
    for ask in (model.invoke, lambda x: list(model.stream(x))):
        with pytest.raises(OutputParserException, match="cut before it was complete"):
            ask("x")
    with pytest.raises(OutputParserException, match="cut before it was complete"):
        _ = [o async for o in model.astream("x")]
    raw = chat.with_structured_output(schema, method=method, include_raw=True).invoke("x")
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)


class Picky(BaseModel):
    city: str

    @field_validator("city")
    @classmethod
    def _capital(cls, value: str) -> str:
        if value != "Oslo":
            raise ValueError("not the capital")
        return value


@pytest.mark.parametrize("method", METHODS)
def test_what_a_schema_cannot_say_is_checked_afterwards(method: Method) -> None:
    chat, _ = canned(answer(method, "Picky", '{"city": "Bergen"}'))
    model = chat.with_structured_output(Picky, method=method)
    with pytest.raises(OutputParserException, match="no Picky: ") as caught:
        model.invoke("x")
    assert "not the capital" in str(caught.value)
    with pytest.raises(OutputParserException):
        list(model.stream("x"))


@pytest.mark.parametrize("method", METHODS)
async def test_the_raw_message_comes_beside_the_object(method: Method) -> None:
    chat, _ = canned(answer(method, "Place"))
    model = chat.with_structured_output(Place, method=method, include_raw=True)
    streamed: Any = None
    for piece in model.stream("x"):
        streamed = piece if streamed is None else streamed + piece
    for result in (model.invoke("x"), await model.ainvoke("x"), streamed):
        assert set(result) == {"raw", "parsed", "parsing_error"}
        assert result["parsed"] == Place(city="Oslo", people=709000)
        assert result["parsing_error"] is None
        assert result["raw"].usage_metadata is not None


def test_a_broken_answer_beside_its_error() -> None:
    chat, _ = canned("no JSON at all")
    result = chat.with_structured_output(Place, include_raw=True).invoke("x")
    assert result["raw"].content == "no JSON at all"
    assert result["parsed"] is None
    assert isinstance(result["parsing_error"], OutputParserException)


def test_tools_may_be_called_before_the_object_is_given() -> None:
    def now() -> str:
        """Tell the time."""
        return "now"

    chat, backend = canned([ToolCall(0, "c1", "now", "{}")], TEXT)
    model = chat.with_structured_output(Place, tools=[now], include_raw=True)
    called, said = model.invoke("x"), model.invoke("x")
    assert (called["parsed"], called["raw"].tool_calls[0]["name"]) == (None, "now")
    assert said["parsed"] == Place(city="Oslo", people=709000)
    assert [t["function"]["name"] for t in backend.requests[0][1]] == ["now"]


def test_a_call_of_another_tool_is_no_object() -> None:
    chat, _ = canned("plain words")
    assert chat.with_structured_output(Place, method="function_calling").invoke("x") is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", [Place, PlaceV1, PlaceDict, SCHEMA])
async def test_tracers_are_told_the_schema(schema: Any, method: Method) -> None:
    class Started(BaseCallbackHandler):
        options: list[Any]

        def on_chat_model_start(self, *_: Any, options: Any = None, **__: Any) -> None:
            self.options.append(options)

    handler = Started()
    handler.options = []
    chat, _ = canned(answer(method, name_of(schema)))
    model = chat.with_structured_output(schema, method=method, strict=None)
    config: Any = {"callbacks": [handler]}
    model.invoke("x", config=config)
    list(model.stream("x", config=config))
    await model.ainvoke("x", config=config)
    for options in handler.options:
        noted = options["ls_structured_output_format"]
        assert noted["schema"] == convert_to_json_schema(schema)
        assert noted["kwargs"]["method"] == method
    assert len(handler.options) == 3


def test_untitled_schemas_and_dataclasses_do_not_trouble_tracers() -> None:
    for schema in (PlaceData, {k: v for k, v in SCHEMA.items() if k != "title"}):
        chat, _ = canned(TEXT)
        assert chat.with_structured_output(cast("Any", schema)).invoke("x") is not None
