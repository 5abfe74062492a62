"""tool_choice="any" and a model of noise: a call comes, of a bound tool, and obeys its schema.

Every round asks in all four of LangChain's ways, which have to agree. As a program:
`python tests/test_tool_choice.py 500` prints the counts, and a second argument names a file for
the rounds that went wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
from langchain_core.messages import AIMessage, AIMessageChunk

from hfcore import ChatHuggingFace
from hfcore.testing import tiny_model

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}}
PARAMETERS: dict[str, dict[str, Any]] = {
    "now": {"type": "object", "properties": {}},
    "weather": {**CITY, "required": ["city"], "additionalProperties": False},
    "add": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": -1000, "maximum": 1000},
            "b": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
        },
        "required": ["a", "b"],
    },
    "remind": {
        "type": "object",
        "properties": {
            "day": {"enum": ["lundi", "日曜日", "any day"]},
            "time": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
            "who": {"type": "array", "items": {"$ref": "#/$defs/who"}, "maxItems": 2},
            "größe": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
        },
        "required": ["day", "who"],
        "$defs": {"who": {"type": "string", "minLength": 1, "maxLength": 8}},
    },
    "tree": {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 99},
                    "child": {"$ref": "#/$defs/node"},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": f"The tool {name}.", "parameters": parameters},
    }
    for name, parameters in PARAMETERS.items()
]
QUESTIONS = [
    "What time is it?", "Weather in Zürich?", "1 + 1", "Plant a tree.", "Rappelle-moi lundi.", "🙂",
]  # fmt: skip


async def answers(chat: ChatHuggingFace, number: int) -> dict[str, AIMessage]:
    """The same request in each of the ways to ask it."""
    asked = chat.bind_tools(TOOLS, tool_choice="any", seed=number)
    question = f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"
    return {
        "invoke": asked.invoke(question),
        "stream": summed(list(asked.stream(question))),
        "ainvoke": await asked.ainvoke(question),
        "astream": summed([chunk async for chunk in asked.astream(question)]),
    }


def summed(chunks: list[Any]) -> AIMessageChunk:
    whole: AIMessageChunk = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


def calls(answer: AIMessage) -> list[tuple[str, dict[str, Any]]]:
    return [(call["name"], call["args"]) for call in answer.tool_calls]


def faults(given: dict[str, AIMessage]) -> list[str]:
    """What is wrong with the answers of a round; the calls are judged in each."""
    found = []
    for way, answer in given.items():
        found += [f"{way}: {fault}" for fault in faults_of(answer)]
        if calls(answer) != calls(given["invoke"]):
            found.append(f"{way}: its calls differ from those of invoke")
    return found


def faults_of(answer: AIMessage) -> list[str]:
    broken = [(call["name"], call["args"]) for call in answer.invalid_tool_calls]
    found = [f"invalid calls {broken}"] if broken else []
    if not answer.tool_calls:
        found.append("no calls")
    for name, args in calls(answer):
        if name not in PARAMETERS:
            found.append(f"unknown tool {name!r}")
            continue
        validator = jsonschema.Draft202012Validator(PARAMETERS[name])
        found += [f"{name}: {error.message}" for error in validator.iter_errors(args)]
    return found


async def test_a_demanded_call_comes_and_obeys_its_schema_however_it_is_asked_for(
    tiny: Path,
) -> None:
    chat = ChatHuggingFace(model=tiny, temperature=1.5, max_tokens=300)
    called = set()
    for number in range(int(os.environ.get("HFCORE_ROUNDS", "40"))):
        given = await answers(chat, number)
        assert faults(given) == [], (number, given)
        called |= {name for name, _ in calls(given["invoke"])}
    assert len(called) > 1, called


async def main(count: int, bad_cases: str | None = None) -> int:
    rounds: Counter[str] = Counter()
    called: Counter[str] = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model(directory)
        chat = ChatHuggingFace(model=model, temperature=1.5, max_tokens=300)
        for number in range(count):
            given = await answers(chat, number)
            wrong = faults(given)
            rounds["wrong" if wrong else "right"] += 1
            rounds["of several calls"] += len(given["invoke"].tool_calls) > 1
            called.update(name for name, _ in calls(given["invoke"]))
            if wrong:
                raw = {way: repr(answer) for way, answer in given.items()}
                bad.append({"seed": number, "max_tokens": 300, "faults": wrong, "answers": raw})
                print(number, wrong, flush=True)
    print(
        f"{count} rounds, 4 answers each: {rounds['right']} right, {rounds['wrong']} wrong;", end=""
    )
    print(f" {rounds['of several calls']} with several calls; calls: {dict(called.most_common())}")
    if bad_cases:
        Path(bad_cases).write_text(json.dumps(bad, ensure_ascii=False, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(asyncio.run(main(int(arguments[0]) if arguments else 500, *arguments[1:2])))
