"""Tools, tool_choice and answer formats: every form of LangChain's, as OpenAI's dicts and back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import BaseTool, InjectedToolArg, tool
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import TypedDict

from hfcore import ChatHuggingFace, Delta, Usage
from hfcore.engine import ToolCall
from hfcore.errors import InvalidRequestError
from hfcore.testing import Canned
from hfcore.tools import from_calls, to_choice, to_response_format, to_schema, to_tools


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


@tool
def add_tool(a: int, b: int, secret: Annotated[str, InjectedToolArg] = "") -> int:
    """Add two numbers."""
    return a + b


class Add(BaseModel):
    """Add two numbers."""

    a: int = Field(description="the first")
    b: int


class AddV1(BaseModelV1):
    """Add two numbers."""

    a: int
    b: int


class AddDict(TypedDict):
    """Add two numbers."""

    a: Annotated[int, ..., "the first"]
    b: int


@dataclass
class AddData:
    """Add two numbers."""

    a: int
    b: int


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
ANTHROPIC = {
    "name": "add", "description": "Add two numbers.", "input_schema": SCHEMA,
    "cache_control": {"type": "ephemeral"},
}  # fmt: skip
OPENAI = {
    "type": "function",
    "function": {"name": "add", "description": "Add two numbers.", "parameters": SCHEMA},
}
BEDROCK = {
    "toolSpec": {
        "name": "add", "description": "Add two numbers.", "inputSchema": {"json": SCHEMA},
    }
}  # fmt: skip


def _runnable() -> BaseTool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as_tool is in beta, and says so
        return RunnableLambda(lambda x: x["a"]).as_tool(
            name="add", description="Add two numbers.", arg_types={"a": int, "b": int}
        )


FORMS: dict[str, tuple[Any, str]] = {
    "function": (add, "add"), "tool": (add_tool, "add_tool"), "pydantic": (Add, "Add"),
    "pydantic v1": (AddV1, "AddV1"), "typed dict": (AddDict, "AddDict"),
    "dataclass": (AddData, "AddData"), "openai": (OPENAI, "add"),
    "openai function": (OPENAI["function"], "add"), "anthropic": (ANTHROPIC, "add"),
    "anthropic custom": ({**ANTHROPIC, "type": "custom"}, "add"), "bedrock": (BEDROCK, "add"),
    "json schema": ({**SCHEMA, "title": "add", "description": "Add two numbers."}, "add"),
    "runnable": (_runnable(), "add"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strict", [None, True, False])
def test_every_form_of_a_tool_becomes_the_same_dict(form: str, strict: bool | None) -> None:
    given, name = FORMS[form]
    [converted] = to_tools([given], strict)
    function = converted["function"]
    assert set(converted) == {"type", "function"}
    assert converted["type"] == "function"
    assert (function["name"], function["description"]) == (name, "Add two numbers.")
    assert set(function["parameters"]["properties"]) == {"a", "b"}
    assert sorted(function["parameters"]["required"]) == ["a", "b"]
    assert function["parameters"]["properties"]["b"]["type"] == "integer"
    assert function.get("strict") is strict
    if strict:
        assert function["parameters"]["additionalProperties"] is False
    assert to_tools([converted]) == [converted]


def test_a_given_dict_is_never_changed() -> None:
    to_tools([OPENAI, {**ANTHROPIC, "name": "other"}], strict=True)
    to_schema(SCHEMA).format(strict=True)
    assert "additionalProperties" not in SCHEMA
    assert "strict" not in OPENAI["function"]


def test_a_tool_without_arguments_has_an_empty_schema() -> None:
    def now() -> str:
        """Tell the time."""
        return "now"

    for given in (now, {"type": "function", "function": {"name": "now"}}, {"name": "now"}):
        [converted] = to_tools([given], strict=True)
        assert converted["function"]["parameters"]["properties"] == {}


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([{"type": "web_search"}], "tool 0 is 'web_search', which a provider runs"),
        ([add, {"type": "web_search_20250305", "name": "web"}], "tool 1 is 'web_search_2025"),
        ([5], "tool 0 .int. is no tool"),
        ([{}], "tool 0 .dict. is no tool"),
        ([{"type": "function", "function": 5}], "tool 0 .dict. is no tool"),
        ([{"type": "function", "function": {"name": ""}}], "tool 0 has no name, got ''"),
        ([{"type": "object", "properties": {}}], "title"),
        ("add", "tools must be a list, got str"),
        (OPENAI, "tools must be a list, got dict"),
        (5, "tools must be a list, got int"),
    ],
)
def test_what_is_no_tool_is_refused_when_bound(tools: Any, words: str) -> None:
    chat, backend = canned()
    for ask in (lambda: chat.bind_tools(tools), lambda: chat.invoke("x", tools=tools)):
        with pytest.raises(InvalidRequestError, match=words):
            ask()
    assert backend.requests == []


def test_two_tools_of_one_name_are_refused_when_asked() -> None:
    chat, backend = canned()
    bound = chat.bind_tools([add, OPENAI])
    for ask in (bound.invoke, lambda x: list(bound.stream(x))):
        with pytest.raises(InvalidRequestError, match="two tools are named 'add'"):
            ask("x")
    assert backend.requests == []


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None), ("auto", "auto"), ("none", "none"), (False, "none"),
        ("any", "required"), ("required", "required"), (True, "required"),
        ("add", NAMED), (NAMED, NAMED), ({"type": "function", "name": "add"}, NAMED),
        ({"type": "tool", "name": "add"}, NAMED), ({"function": {"name": "add"}}, NAMED),
        ({"type": "any"}, "required"), ({"type": "auto"}, "auto"), ({"type": "none"}, "none"),
    ],
)  # fmt: skip
def test_every_form_of_a_choice_becomes_openais(choice: Any, expected: Any) -> None:
    assert to_choice(choice, [OPENAI]) == expected
    chat, backend = canned()
    chat.bind_tools([add], tool_choice=choice).invoke("x")
    chat.invoke("x", tools=[add], tool_choice=choice)
    for _, tools, asked in backend.requests:
        assert [t["function"]["name"] for t in tools] == ["add"]
        assert asked == ({} if expected is None else {"tool_choice": expected})


@pytest.mark.parametrize(
    ("choice", "tools", "words"),
    [
        ("ad", [OPENAI], "names 'ad', which is no tool .* .there are: 'add'.; did you mean 'add'"),
        ("zzz", [OPENAI], "names 'zzz'"),
        ("zzz", [], "tool_choice is 'zzz', but there are no tools"),
        ("any", [], "tool_choice is 'any', but there are no tools"),
        ("auto", [], "tool_choice is 'auto', but there are no tools"),
        ("none", [], "tool_choice is 'none', but there are no tools"),
        (False, [], "tool_choice is False, but there are no tools"),
        ({"type": "auto"}, [], "'auto'}, but there are no tools"),
        (5, [OPENAI], "must be a str, a dict or a bool, got 5"),
        ({"type": "tool", "name": "x"}, [OPENAI], "names 'x'"),
        ({"type": "tool", "name": "add", "disable_parallel_tool_use": True}, [OPENAI], "no choice"),
        ({"type": "allowed_tools"}, [OPENAI], "no choice of a tool"),
        ({"type": "function", "function": "add"}, [OPENAI], "no choice of a tool"),
        ({}, [OPENAI], "no choice of a tool"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_when_bound(
    choice: Any, tools: list[Any], words: str
) -> None:
    chat, backend = canned()
    for ask in (
        lambda: chat.bind_tools(tools, tool_choice=choice),
        lambda: chat.invoke("x", tools=tools, tool_choice=choice),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            ask()
    assert backend.requests == []


def test_a_tool_may_be_called_like_a_word_of_the_choice() -> None:
    named = {"name": "auto", "parameters": SCHEMA}
    assert to_choice("auto", to_tools([named])) == {
        "type": "function",
        "function": {"name": "auto"},
    }


def test_all_that_is_bound_with_tools_reaches_the_engine() -> None:
    chat, backend = canned()
    bound = chat.bind_tools(
        [Add], tool_choice="any", strict=True, parallel_tool_calls=False, response_format=Add,
        max_new_tokens=5,
    )  # fmt: skip
    bound.invoke("x", max_tokens=7)
    _, [given], asked = backend.requests[0]
    assert given["function"]["strict"] is True
    assert asked.pop("response_format")["json_schema"]["strict"] is True
    assert asked == {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 7}


def test_a_call_says_otherwise_than_what_was_bound() -> None:
    chat, backend = canned()
    bound = chat.bind_tools([add], tool_choice="any")
    bound.invoke("x", tool_choice="none")
    bound.invoke("x", tools=[Add])
    assert backend.requests[0][2] == {"tool_choice": "none"}
    assert backend.requests[1][1][0]["function"]["name"] == "Add"
    with pytest.raises(InvalidRequestError, match="there are no tools"):
        bound.invoke("x", tools=[])
    with pytest.raises(InvalidRequestError, match="names 'add'"):
        chat.bind_tools([add], tool_choice="add").invoke("x", tools=[Add])


def test_a_stronger_shape_of_the_answer_drops_a_weaker() -> None:
    chat, backend = canned(regex="a+")
    chat.invoke("x", response_format={"type": "json_object"})
    chat.bind(choice=["a"]).invoke("x", grammar='start: "a"')
    assert [asked for _, _, asked in backend.requests] == [
        {"response_format": {"type": "json_object"}},
        {"grammar": 'start: "a"'},
    ]


# answer formats


@pytest.mark.parametrize("source", [Add, AddV1, AddDict, AddData])
def test_a_class_is_an_answer_format(source: Any) -> None:
    made = to_response_format(source)
    assert made["type"] == "json_schema"
    assert made["json_schema"]["name"] == source.__name__
    assert set(made["json_schema"]["schema"]["properties"]) == {"a", "b"}
    assert "strict" not in made["json_schema"]
    assert to_response_format(made) == made


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (OPENAI, "add"), (OPENAI["function"], "add"), (ANTHROPIC, "add"), (SCHEMA, "response"),
        ({**SCHEMA, "title": "Sum"}, "Sum"), ({**SCHEMA, "title": "A whole sentence"}, "response"),
        ({"name": "n", "schema": SCHEMA, "strict": True}, "n"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, "n"),
    ],
)  # fmt: skip
def test_a_dict_that_holds_a_schema_is_one(given: Any, name: str) -> None:
    known = to_schema(given)
    assert known.name == name
    assert known.schema["properties"] == SCHEMA["properties"]


@pytest.mark.parametrize("given", [5, "json", None, int, [SCHEMA]])
def test_what_has_no_schema_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequestError):
        to_schema(given)


def test_an_answer_format_comes_with_the_call_the_binding_or_the_object() -> None:
    expected = to_response_format(Add)
    asked: dict[str, Any] = {"response_format": Add}
    for make, call in ((asked, {}), ({}, asked)):
        chat, backend = canned(**make)
        chat.invoke("x", **call)
        chat.bind(response_format=Add).invoke("x", tools=[add])
        assert [o for _, _, o in backend.requests] == [{"response_format": expected}] * 2


# answers


CALLS = [ToolCall(0, "c1", "add", '{"a": 1, "b": 2}'), ToolCall(1, "c2", "now", "{}")]


def canned(*answers: Any, **kwargs: Any) -> tuple[ChatHuggingFace, Canned]:
    chat = ChatHuggingFace(model="owner/canned", **kwargs)
    chat.llm._backend = backend = Canned(*answers, model_name="owner/canned")
    return chat, backend


def summed(chunks: list[Any]) -> AIMessageChunk:
    whole: AIMessageChunk = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


PARSED = [
    {"name": "add", "args": {"a": 1, "b": 2}, "id": "c1", "type": "tool_call"},
    {"name": "now", "args": {}, "id": "c2", "type": "tool_call"},
]


async def test_calls_are_the_same_however_they_are_asked_for() -> None:
    chat, _ = canned(CALLS)
    answers = [
        chat.invoke("x"), await chat.ainvoke("x"), summed(list(chat.stream("x"))),
        summed([c async for c in chat.astream("x")]), chat.invoke("x", stream=True),
    ]  # fmt: skip
    for answer in answers:
        assert answer.tool_calls == PARSED
        assert answer.content == ""
        assert answer.invalid_tool_calls == []
        assert answer.response_metadata["finish_reason"] == "tool_calls"
        assert answer.usage_metadata == answers[0].usage_metadata is not None
        blocks = [b for b in answer.content_blocks if b["type"] == "tool_call"]
        assert [(b["name"], b["args"], b["id"]) for b in blocks] == [
            (c["name"], c["args"], c["id"]) for c in PARSED
        ]


def test_pieces_of_calls_are_streamed_as_they_come() -> None:
    chat, _ = canned(CALLS)
    *pieces, last = chat.stream("x")
    [head] = pieces[0].tool_call_chunks
    [rest] = pieces[1].tool_call_chunks
    assert (head["name"], head["id"], head["index"]) == ("add", "c1", 0)
    assert (rest["name"], rest["id"], rest["index"]) == (None, None, 0)
    assert str(head["args"]) + str(rest["args"]) == '{"a": 1, "b": 2}'
    assert [c.tool_call_chunks[0]["index"] for c in pieces] == [0, 0, 1, 1]
    assert (last.chunk_position, last.tool_call_chunks) == ("last", [])


@pytest.mark.parametrize("version", [None, "v0", "v1"])
async def test_text_thoughts_and_calls_of_one_answer_stay_apart(version: str | None) -> None:
    deltas = [
        Delta(reasoning="Let me "), Delta(reasoning="think."), Delta("I ask"),
        Delta(" add.", tool_calls=(ToolCall(0, "c1", "add", '{"a": 1,'),)),
        Delta(
            tool_calls=(ToolCall(0, None, None, ' "b": 2}'),),
            finish_reason="tool_calls", usage=Usage(3, 9, reasoning_tokens=4),
        ),
    ]  # fmt: skip
    chat, _ = canned(deltas, **({"output_version": version} if version else {}))
    for answer in (
        chat.invoke("x"), summed(list(chat.stream("x"))), await chat.ainvoke("x"),
        summed([c async for c in chat.astream("x")]),
    ):  # fmt: skip
        assert answer.text == "I ask add."
        assert answer.tool_calls == PARSED[:1]
        assert [b["type"] for b in answer.content_blocks] == ["reasoning", "text", "tool_call"]
        assert answer.content_blocks[0]["reasoning"] == "Let me think."  # type: ignore[typeddict-item]  # a union; asserted above
        assert answer.additional_kwargs["reasoning_content"] == "Let me think."
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["output_tokens"] == 9
        assert answer.usage_metadata["output_token_details"] == {"reasoning": 4}
        assert isinstance(answer.content, list) == (version == "v1")
        chat.invoke([HumanMessage("x"), answer, ToolMessage("3", tool_call_id="c1")])
        prompt = chat.llm.backend.requests[-1][0]  # type: ignore[attr-defined]  # it is Canned
        assert prompt[1] == {
            "role": "assistant", "content": "I ask add.", "reasoning_content": "Let me think.",
            "tool_calls": [
                {
                    "id": "c1", "type": "function",
                    "function": {"name": "add", "arguments": {"a": 1, "b": 2}},
                }
            ],
        }  # fmt: skip
        assert prompt[2]["name"] == "add"


def test_usage_has_no_details_where_thoughts_are_not_told_apart() -> None:
    chat, _ = canned("ok")
    for answer in (chat.invoke("x"), summed(list(chat.stream("x")))):
        assert answer.usage_metadata is not None
        assert "output_token_details" not in answer.usage_metadata


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "5", "nonsense", "null"])
def test_arguments_that_are_no_object_are_an_invalid_call(arguments: str) -> None:
    chat, _ = canned([ToolCall(0, "c1", "add", arguments), ToolCall(1, "c2", "now", "")])
    answer = chat.invoke("x")
    [broken] = answer.invalid_tool_calls
    assert (broken["name"], broken["args"], broken["id"]) == ("add", arguments, "c1")
    assert "no JSON object" in str(broken["error"])
    assert answer.tool_calls == PARSED[1:]
    follow = [HumanMessage("x"), answer, ToolMessage("?", tool_call_id="c1", status="error")]
    assert isinstance(chat.invoke(follow), AIMessage)


def test_calls_keep_their_order_and_unicode() -> None:
    valid, invalid = from_calls([ToolCall(0, "c1", "f", '{"é": "日本"}')])
    assert (valid[0]["args"], invalid) == ({"é": "日本"}, [])


def test_callbacks_get_a_token_for_each_piece_of_a_call() -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    class Pieces(BaseCallbackHandler):
        seen: list[str]

        def on_llm_new_token(self, token: Any, *, chunk: Any = None, **_: Any) -> None:
            self.seen += [str(c["args"]) for c in chunk.message.tool_call_chunks]

    handler = Pieces()
    handler.seen = []
    chat, _ = canned(CALLS)
    list(chat.stream("x", config={"callbacks": [handler]}))
    assert "".join(handler.seen) == '{"a": 1, "b": 2}{}'


def test_tools_are_counted(tiny: Any) -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}"
    )
    chat = ChatHuggingFace(model=tiny, chat_template=template)
    more = chat.get_num_tokens_from_messages([HumanMessage("Hi")], [add, Add])
    assert more == len(chat.get_token_ids("addAddHi"))
