"""Loops of model and tools: by hand, by LangChain's agents, and in LangGraph graphs.

On scripted answers, which say what has to come out, and on the model of noise, which is the engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
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


@tool
def shout(text: str) -> str:
    """Write a text in capitals."""
    return text.upper()


def agent(chat: ChatHuggingFace, **kwargs: Any) -> Any:
    return create_agent(chat, [add], **kwargs)


def graph_of(chat: ChatHuggingFace) -> Any:
    """A call that must be, its tool, and an answer.

    Before Python 3.11 asyncio hands no config on by itself.
    """

    def call(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        model = chat.bind_tools([add, shout], tool_choice="any")
        return {"messages": [model.invoke(state["messages"], config)]}

    async def answer(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        return {"messages": [await chat.ainvoke(state["messages"], config)]}

    graph = StateGraph(MessagesState)
    graph.add_node("call", call)
    graph.add_node("tools", ToolNode([add, shout]))
    graph.add_node("answer", answer)
    for edge in ((START, "call"), ("call", "tools"), ("tools", "answer"), ("answer", END)):
        graph.add_edge(*edge)
    return graph.compile()


def noise(tiny: Path) -> ChatHuggingFace:
    return ChatHuggingFace(model=tiny, max_tokens=120, temperature=1, seed=3)


QUESTION: Any = {"messages": [HumanMessage("1 + 2?")]}


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


STRATEGIES = {"provider": ProviderStrategy(Sum), "tool": ToolStrategy(Sum), "the class": Sum}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_agent_ends_with_an_object(strategy: str) -> None:
    by_tool = [ToolCall(0, "c2", "Sum", '{"value": 3}')]
    last: Any = by_tool if strategy == "tool" else '{"value": 3}'
    chat, backend = canned(CALLED, last)
    wanted: Any = STRATEGIES[strategy]
    state = agent(chat, response_format=wanted).invoke(QUESTION)
    assert state["structured_response"] == Sum(value=3)
    asked = backend.requests[0][2]
    if strategy == "tool":
        assert asked["tool_choice"] == "required"
    else:
        assert asked["response_format"]["json_schema"]["name"] == "Sum"


async def test_a_graph_streams_the_tokens_of_each_of_its_models() -> None:
    chat, backend = canned(CALLED, "The sum is 3")
    graph = graph_of(chat)
    streamed = [
        (m, about["langgraph_node"])
        async for m, about in graph.astream(QUESTION, stream_mode="messages")
    ]
    said = [m.content for m, node in streamed if node == "answer" and m.content]
    assert said == ["The", " sum", " is", " 3"]
    pieces = [p for m, node in streamed if node == "call" for p in m.tool_call_chunks]
    assert "".join(p["args"] or "" for p in pieces) == '{"a": 1, "b": 2}'
    assert [m.content for m, node in streamed if node == "tools"] == ["3"]
    assert [asked.get("tool_choice") for _, _, asked in backend.requests] == ["required", None]


async def test_a_graph_of_the_engine_calls_a_tool_and_streams_its_answer(tiny: Path) -> None:
    graph = graph_of(noise(tiny))
    _, called, result, said = (await graph.ainvoke(QUESTION))["messages"]
    [call] = called.tool_calls
    assert called.invalid_tool_calls == []
    expected = {"add": add, "shout": shout}[call["name"]].invoke(call["args"])
    assert (result.content, result.tool_call_id) == (str(expected), call["id"])
    chunks: dict[str, list[Any]] = {"call": [], "tools": [], "answer": []}
    async for m, about in graph.astream(QUESTION, stream_mode="messages"):
        chunks[about["langgraph_node"]].append(m)
    texts = [m.content for m in chunks["answer"] if m.content]
    assert len(texts) > 5
    assert "".join(texts) == said.content
    arguments = [p["args"] for m in chunks["call"] for p in m.tool_call_chunks]
    assert len(arguments) > 3
    assert json.loads("".join(a or "" for a in arguments)) == call["args"]


async def test_an_agent_of_the_engine_streams_the_tokens_that_it_answers(tiny: Path) -> None:
    graph = agent(noise(tiny), system_prompt="Be brief.")
    for stated, streamed in (
        (graph.invoke(QUESTION), list(graph.stream(QUESTION, stream_mode="messages"))),
        (
            await graph.ainvoke(QUESTION),
            [pair async for pair in graph.astream(QUESTION, stream_mode="messages")],
        ),
    ):
        said = stated["messages"][-1]
        chunks = [m for m, _ in streamed if isinstance(m, AIMessageChunk)]
        assert said.usage_metadata["output_tokens"] > 5
        assert len([c for c in chunks if c.content]) > 5
        assert "".join(str(c.content) for c in chunks) == said.content


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_agent_of_the_engine_ends_with_an_object(strategy: str, tiny: Path) -> None:
    wanted: Any = STRATEGIES[strategy]
    state = create_agent(noise(tiny), response_format=wanted).invoke(QUESTION)
    assert isinstance(state["structured_response"], Sum)


def test_a_broken_call_goes_back_to_the_model_not_to_the_tool() -> None:
    chat, backend = canned([ToolCall(0, "c1", "add", '{"a": ')], "Sorry")
    answer = chat.bind_tools([add]).invoke("1 + 2?")
    assert isinstance(answer, AIMessage)
    assert answer.tool_calls == []
    assert chat.invoke([HumanMessage("1 + 2?"), answer, HumanMessage("Again")]).content == "Sorry"
    assert backend.requests[1][0][1]["tool_calls"][0]["function"]["arguments"] == '{"a": '
