"""Loops of model and tools: by hand, and by LangChain's agents where those are installed."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from hfcore import ChatHuggingFace
from hfcore.engine import ToolCall
from hfcore.testing import Canned


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Sum(BaseModel):
    """The sum."""

    value: int


CALLED = [ToolCall(0, "c1", "add", '{"a": 1, "b": 2}')]


def canned(*answers: Any) -> tuple[ChatHuggingFace, Canned]:
    chat = ChatHuggingFace(model="owner/canned")
    chat.llm._backend = backend = Canned(*answers, model_name="owner/canned")
    return chat, backend


def test_a_loop_by_hand_ends_with_the_answer() -> None:
    chat, backend = canned(CALLED, "The sum is 3")
    model = chat.bind_tools([add])
    messages: list[BaseMessage] = [HumanMessage("1 + 2?")]
    while True:
        answer = model.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            break
        messages += [add.invoke(call) for call in answer.tool_calls]
    assert answer.content == "The sum is 3"
    assert [m["role"] for m in backend.requests[1][0]] == ["user", "assistant", "tool"]
    assert backend.requests[1][0][2] == {
        "role": "tool", "name": "add", "tool_call_id": "c1", "content": "3",
    }  # fmt: skip


def agent(chat: ChatHuggingFace, **kwargs: Any) -> Any:
    agents = pytest.importorskip("langchain.agents", reason="needs langchain")
    return agents.create_agent(chat, [add], **kwargs)


QUESTION = {"messages": [HumanMessage("1 + 2?")]}


async def test_an_agent_calls_its_tool_and_answers() -> None:
    chat, backend = canned(CALLED, "The sum is 3")
    graph = agent(chat, system_prompt="Be brief.")
    for state in (graph.invoke(QUESTION), await graph.ainvoke(QUESTION)):
        _, called, result, said = state["messages"]
        assert called.tool_calls[0]["args"] == {"a": 1, "b": 2}
        assert (result.content, said.content) == ("3", "The sum is 3")
    assert [m["role"] for m in backend.requests[3][0]] == ["system", "user", "assistant", "tool"]
    assert [t["function"]["name"] for t in backend.requests[0][1]] == ["add"]


async def test_an_agent_streams_tokens_and_pieces_of_calls() -> None:
    chat, _ = canned(CALLED, "The sum is 3")
    graph = agent(chat)
    sync = [m for m, _ in graph.stream(QUESTION, stream_mode="messages")]
    other = [m async for m, _ in graph.astream(QUESTION, stream_mode="messages")]
    for streamed in (sync, other):
        chunks = [m for m in streamed if isinstance(m, AIMessageChunk)]
        assert [c.content for c in chunks if c.content] == ["The", " sum", " is", " 3"]
        pieces = [p for c in chunks for p in c.tool_call_chunks]
        assert "".join(p["args"] or "" for p in pieces) == '{"a": 1, "b": 2}'
        assert pieces[0]["name"] == "add"
        assert [m.content for m in streamed if m.type == "tool"] == ["3"]


@pytest.mark.parametrize("strategy", ["ProviderStrategy", "ToolStrategy", "the class alone"])
def test_an_agent_ends_with_an_object(strategy: str) -> None:
    structured_output = pytest.importorskip(
        "langchain.agents.structured_output", reason="needs langchain"
    )
    by_tool = [ToolCall(0, "c2", "Sum", '{"value": 3}')]
    last: Any = by_tool if strategy == "ToolStrategy" else '{"value": 3}'
    chat, backend = canned(CALLED, last)
    wanted: Any = Sum if " " in strategy else getattr(structured_output, strategy)(Sum)
    state = agent(chat, response_format=wanted).invoke(QUESTION)
    assert state["structured_response"] == Sum(value=3)
    asked = backend.requests[0][2]
    if strategy == "ToolStrategy":
        assert asked["tool_choice"] == "required"
    else:
        assert asked["response_format"]["json_schema"]["name"] == "Sum"


def test_a_broken_call_goes_back_to_the_model_not_to_the_tool() -> None:
    chat, backend = canned([ToolCall(0, "c1", "add", '{"a": ')], "Sorry")
    answer = chat.bind_tools([add]).invoke("1 + 2?")
    assert isinstance(answer, AIMessage)
    assert answer.tool_calls == []
    assert chat.invoke([HumanMessage("1 + 2?"), answer, HumanMessage("Again")]).content == "Sorry"
    assert backend.requests[1][0][1]["tool_calls"][0]["function"]["arguments"] == '{"a": '
