"""LangChain's messages as the dicts that chat templates take."""

from __future__ import annotations

import re
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from hfcore.errors import InvalidRequestError
from hfcore.messages import to_dicts

TEXT: dict[str, Any] = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
CALL = {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"}
CALLED = {
    "id": "c1",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1}},
}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage("s"), {"role": "system", "content": "s"}),
        (HumanMessage("h", name="Ann"), {"role": "user", "name": "Ann", "content": "h"}),
        (AIMessage("a"), {"role": "assistant", "content": "a"}),
        (ChatMessage(role="critic", content="c"), {"role": "critic", "content": "c"}),
        (FunctionMessage(name="f", content="1"), {"role": "tool", "name": "f", "content": "1"}),
        (
            ToolMessage("3", tool_call_id="c1", name="add"),
            {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "3"},
        ),
        (HumanMessage([TEXT, "there"]), {"role": "user", "content": "hello\nthere"}),
        (AIMessage([TEXT, TEXT]), {"role": "assistant", "content": "hellohello"}),
        (AIMessage([{"type": "refusal", "refusal": "no"}]), {"role": "assistant", "content": "no"}),
        (HumanMessage(""), {"role": "user", "content": ""}),
    ],
)
def test_each_class_has_its_role_and_text(message: BaseMessage, expected: dict[str, Any]) -> None:
    assert to_dicts([message]) == [expected]


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("", tool_calls=[CALL]),
        AIMessage([{"type": "tool_use", "name": "add", "input": {"a": 1}, "id": "c1"}]),
        AIMessage([CALL]),
        AIMessage(
            [{"type": "tool_use", "name": "add", "input": {}, "id": "c1"}], tool_calls=[CALL]
        ),
    ],
)
def test_tool_calls_carry_their_arguments_as_an_object(message: AIMessage) -> None:
    expected = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert to_dicts([message]) == [expected]


def test_an_invalid_tool_call_keeps_its_text() -> None:
    broken = {
        "name": "add",
        "args": '{"a": ',
        "id": "c1",
        "error": "cut",
        "type": "invalid_tool_call",
    }
    [converted] = to_dicts([AIMessage("", invalid_tool_calls=[broken])])
    assert converted["tool_calls"][0]["function"]["arguments"] == '{"a": '


def test_a_legacy_function_call_is_a_tool_call() -> None:
    legacy = {"function_call": {"name": "add", "arguments": '{"a": 1}'}}
    [converted] = to_dicts([AIMessage("", additional_kwargs=legacy)])
    assert converted["tool_calls"][0]["function"] == CALLED["function"]


@pytest.mark.parametrize(
    "message",
    [
        AIMessage([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]),
        AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "yes"}]),
        AIMessage(
            [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, "yes"]
        ),
        AIMessage("yes", additional_kwargs={"reasoning_content": "hm"}),
    ],
)
def test_reasoning_stands_apart_from_the_text(message: AIMessage) -> None:
    expected = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert to_dicts([message]) == [expected]


def test_a_tool_result_names_its_tool_and_its_failure() -> None:
    failed = ToolMessage("no such key", tool_call_id="c1", status="error")
    *_, converted = to_dicts([AIMessage("", tool_calls=[CALL]), failed])
    assert converted == {
        "role": "tool", "tool_call_id": "c1", "name": "add", "content": "Error: no such key",
    }  # fmt: skip


def test_results_among_a_users_blocks_come_before_the_users_words() -> None:
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [TEXT], "is_error": False}
    converted = to_dicts([AIMessage("", tool_calls=[CALL]), HumanMessage([result, TEXT])])
    assert [(m["role"], m["content"]) for m in converted[1:]] == [
        ("tool", "hello"),
        ("user", "hello"),
    ]
    assert converted[1]["name"] == "add"
    assert [m["role"] for m in to_dicts([HumanMessage([result])])] == ["tool"]


def test_v1_content_of_an_answer_goes_back_as_text_and_calls() -> None:
    said = AIMessage([{"type": "text", "text": "Let me see."}, CALL], output_version="v1")
    assert to_dicts([said]) == [
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALLED]}
    ]


@pytest.mark.parametrize(
    "kind", ["image", "image_url", "input_audio", "audio", "file", "video", "?"]
)
def test_a_block_that_is_not_text_is_named(kind: str) -> None:
    words = re.escape(f"message 1 holds a block of type {kind!r}; this model reads text only")
    with pytest.raises(InvalidRequestError, match=words):
        to_dicts([HumanMessage("x"), HumanMessage([TEXT, {"type": kind, kind: {"url": "u"}}])])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the conversation is empty"),
        ([RemoveMessage(id="1")], "message 0 is a RemoveMessage"),
        (["hi"], "message 0 must be a LangChain message, got str"),
        ([HumanMessage([{"text": "no type"}])], "block of type None"),
        ([HumanMessage([{"type": "text"}])], "a text block, no text"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        to_dicts(messages)


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", 5])
@pytest.mark.parametrize("kind", ["tool_use", "function_call"])
def test_arguments_that_are_no_object_are_named(arguments: Any, kind: str) -> None:
    block = {"type": "tool_use", "name": "add", "input": arguments, "id": "c1"}
    legacy = {"function_call": {"name": "add", "arguments": arguments}}
    said = AIMessage([block]) if kind == "tool_use" else AIMessage("", additional_kwargs=legacy)
    words = re.escape(
        f"message 1: the arguments of call 'add' are no JSON object, got {arguments!r}"
    )
    with pytest.raises(InvalidRequestError, match=words):
        to_dicts([HumanMessage("x"), said])
