"""LangChain messages -> OpenAI-shaped dicts, in the form that chat templates take: content is text.

Images, audio and files are refused by the name of their block, since a text model cannot read
them; for a server, which may, they become OpenAI's content parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from . import parts as content_parts
from .errors import InvalidRequestError

_TEXT = {"text": "text", "refusal": "refusal", "text-plain": "text"}
_REASONING = ("thinking", "reasoning")
_ELSEWHERE = {
    "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call",
    "input_json_delta", "redacted_thinking", "tool_result",
}  # fmt: skip
"""Block types whose substance a message also holds elsewhere (tool_calls), or that have none."""


def to_dicts(messages: Sequence[BaseMessage], *, parts: bool = False) -> list[dict[str, Any]]:
    """A conversation as dicts with role and text content.

    `parts`: content that is not text alone is a list of OpenAI's content parts.

    Text blocks of one message are joined by line breaks, an assistant's without. Tool calls carry
    their arguments as objects; a tool result names its tool, and says so when it is an error.
    Raises InvalidRequestError for no messages, unknown classes, blocks that are not text, and calls
    whose arguments are no JSON object (but those that LangChain itself marks as invalid stay).

    >>> to_dicts([HumanMessage([{"type": "text", "text": "Hi"}])])
    [{'role': 'user', 'content': 'Hi'}]
    """
    if not messages:
        raise InvalidRequestError("the conversation is empty: at least one message is needed")
    called: dict[str, str] = {}
    result = []
    for position, message in enumerate(messages):
        converted = _to_dict(message, position, parts)
        for call in converted.get("tool_calls", ()):
            called[call["id"]] = call["function"]["name"]
        results = _tool_results(message.content, position, parts)
        result += results
        if converted["content"] or not results:
            result.append(converted)
    for tool in (message for message in result if message["role"] == "tool"):
        name = tool.get("name") or called.get(tool.get("tool_call_id", ""))
        tool |= {"name": name} if name else {}
    return result


def _tool_results(content: Any, position: int, parts: bool) -> list[dict[str, Any]]:
    """Anthropic's way: results as blocks of a user's message. Each becomes a message before it."""
    return [
        {
            "role": "tool",
            "tool_call_id": str(block.get("tool_use_id", "")),
            "content": _result(
                _content(block.get("content"), position, parts),
                failed=bool(block.get("is_error")),
            ),
        }
        for block in _blocks(content)
        if isinstance(block, Mapping) and block.get("type") == "tool_result"
    ]


def _to_dict(message: BaseMessage, position: int, parts: bool) -> dict[str, Any]:
    if not isinstance(message, BaseMessage):
        raise InvalidRequestError(
            f"message {position} must be a LangChain message, got {type(message).__name__}"
        )
    name = {"name": message.name} if message.name else {}
    if isinstance(message, AIMessage):
        return {"role": "assistant", **name, **_assistant(message, position)}
    content = _content(message.content, position, parts)
    if isinstance(message, ToolMessage):
        return {"role": "tool", **name, "tool_call_id": message.tool_call_id,
                "content": _result(content, failed=message.status == "error")}  # fmt: skip
    if isinstance(message, FunctionMessage):
        return {"role": "tool", **name, "content": content}
    return {"role": _role(message, position), **name, "content": content}


def _role(message: BaseMessage, position: int) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    raise InvalidRequestError(
        f"message {position} is a {type(message).__name__}, which no chat template knows"
    )


def _assistant(message: AIMessage, position: int) -> dict[str, Any]:
    result: dict[str, Any] = {"content": _text(message.content, position, joint="")}
    reasoning = _reasoning(message)
    if reasoning:
        result["reasoning_content"] = reasoning
    calls = _calls(message, position)
    if calls:
        result["tool_calls"] = calls
    return result


def _calls(message: AIMessage, position: int) -> list[dict[str, Any]]:
    """Valid and invalid calls; else those that only the content blocks tell of.

    An invalid call keeps its text: that is what the model wrote, and can learn from.
    """
    calls = [_call(c["name"], c["args"], c["id"]) for c in message.tool_calls]
    calls += [_call(c["name"], _object(c["args"]), c["id"]) for c in message.invalid_tool_calls]
    if calls:
        return calls
    told = [
        (b.get("name"), b.get("input", b.get("args")), b.get("id"))
        for b in _blocks(message.content)
        if isinstance(b, Mapping) and b.get("type") in ("tool_use", "tool_call")
    ]
    # In OpenAI's form; LangChain has read those that it could.
    given = message.additional_kwargs
    legacy = [] if told else [*_listed(given.get("tool_calls")), given.get("function_call")]
    told += [_openai(call) for call in legacy if isinstance(call, Mapping)]
    return [_call(name, _checked(args, name, position), call_id) for name, args, call_id in told]


def check_calls(conversation: Any) -> None:
    """Refuse message dicts with a call whose arguments are no JSON object, by place and name.

    LangChain would say what is wrong with the JSON, not where it is.
    """
    for position, message in enumerate(_listed(conversation)):
        if isinstance(message, Mapping):
            for call in _listed(message.get("tool_calls")):
                name, args, _ = _openai(call) if isinstance(call, Mapping) else (None, call, None)
                _checked(args, name, position)


def _openai(call: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Name, arguments and id of a call in a dict: OpenAI's, its older form, or LangChain's."""
    inner = call.get("function")
    inner = inner if isinstance(inner, Mapping) else call
    return inner.get("name"), inner.get("arguments", inner.get("args")), call.get("id")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _checked(arguments: Any, name: Any, position: int) -> Any:
    """Arguments that must be an object."""
    arguments = _object(arguments)
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(
            f"message {position}: the arguments of call {name!r} are no JSON object,"
            f" got {arguments!r:.200}"
        )
    return arguments


def _object(arguments: Any) -> Any:
    """Arguments as an object, which templates write as JSON; as they are if they are not one."""
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _call(name: Any, arguments: Any, call_id: Any) -> dict[str, Any]:
    function = {"name": name or "", "arguments": arguments}
    return {"id": call_id or "", "type": "function", "function": function}


def _reasoning(message: AIMessage) -> str:
    kept = message.additional_kwargs.get("reasoning_content")
    if isinstance(kept, str):
        return kept
    blocks = (b for b in _blocks(message.content) if isinstance(b, Mapping))
    return "".join(_thought(b) for b in blocks if b.get("type") in _REASONING)


def _thought(block: Mapping[str, Any]) -> str:
    text = block.get(block["type"])
    if isinstance(text, str):
        return text
    summary = block.get("summary")
    parts = summary if isinstance(summary, list) else []
    return "".join(p.get("text", "") for p in parts if isinstance(p, Mapping))


def _text(content: Any, position: int, joint: str = "\n") -> str:
    return joint.join(_block_texts(_blocks(content), position))


def _content(content: Any, position: int, parts: bool) -> str | list[dict[str, Any]]:
    """Text; or, where there is more than that and `parts` may be, all of it in its order."""
    blocks = _blocks(content)
    if not parts or not any(map(_is_part, blocks)):
        return _text(content, position)
    result: list[dict[str, Any]] = []
    for block in blocks:
        if _is_part(block):
            result.append(content_parts.part(block, position))
        else:
            result += [{"type": "text", "text": t} for t in _block_texts([block], position)]
    return result


def _is_part(block: Any) -> bool:
    """Whether a block is more than text; text in a file's block is text."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    return kind in content_parts.KINDS and not (
        kind in _TEXT and isinstance(block.get("text"), str)
    )


def _blocks(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    return [] if content is None or content == "" else [content]


def _block_texts(blocks: Iterable[Any], position: int) -> Iterable[str]:
    for block in blocks:
        if isinstance(block, str):
            yield block
            continue
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind in _REASONING or kind in _ELSEWHERE:
            continue
        text = block.get(_TEXT[kind]) if kind in _TEXT else None
        if not isinstance(text, str):
            what = f"a block of type {kind!r}" if kind not in _TEXT else f"a {kind} block, no text"
            raise InvalidRequestError(
                f"message {position} holds {what}; this model reads text only"
            )
        yield text


def _result(content: str | list[dict[str, Any]], *, failed: bool) -> str | list[dict[str, Any]]:
    """A tool's result; a failure says so, for templates have no other way to tell."""
    if isinstance(content, list):
        return [*([{"type": "text", "text": "Error:"}] if failed else []), *content]
    text = content
    return f"Error: {text}" if failed and not text.lower().startswith("error") else text
