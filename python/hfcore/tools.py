"""Tools, the choice among them and answer formats, in every form that LangChain has for them.

They become OpenAI-shaped dicts here, and called tools become LangChain's; nothing here calls one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import InvalidToolCall
from langchain_core.messages import ToolCall as ParsedCall
from langchain_core.messages.tool import invalid_tool_call, tool_call
from langchain_core.utils.function_calling import convert_to_openai_function, convert_to_openai_tool
from pydantic import TypeAdapter

from .engine import ToolCall
from .errors import InvalidRequestError
from .options import check_choice, nearest

_LOCAL_KINDS = ("function", "object", "custom")
"""What a dict's type says when it describes a tool that the caller runs."""

_WORDS = {"any": "required", "required": "required", "auto": "auto", "none": "none"}
_FORMATS = ("text", "json_object", "json_schema")


@dataclasses.dataclass(frozen=True)
class Schema:
    """A JSON schema with a name, as tools and answer formats carry it."""

    name: str
    schema: dict[str, Any]
    description: str | None = None

    def tool(self) -> dict[str, Any]:
        """As the tool whose arguments it describes."""
        about = {"description": self.description} if self.description else {}
        function = {"name": self.name, **about, "parameters": self.schema}
        return {"type": "function", "function": function}

    def format(self, strict: bool | None = None) -> dict[str, Any]:
        """As a response_format."""
        schema = self.schema
        if strict:
            closed = {"name": self.name, "parameters": schema}
            schema = convert_to_openai_function(closed, strict=True)["parameters"]
        asked = {} if strict is None else {"strict": strict}
        return {
            "type": "json_schema",
            "json_schema": {"name": self.name, "schema": schema, **asked},
        }


def to_tools(tools: Sequence[Any] | None, strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools of any kind -> OpenAI tool dicts, each with a name and parameters.

    Kinds: function, BaseTool, pydantic class (1 or 2), TypedDict, dataclass; dict of OpenAI,
    Anthropic or Bedrock, or a JSON schema with a title. Raises InvalidRequestError for anything
    else, and for tools that a provider runs.

    >>> def add(a: int, b: int) -> int:
    ...     "Add two numbers."
    ...     return a + b
    >>> to_tools([add])[0]["function"]["name"]
    'add'
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable | None):
        raise InvalidRequestError(f"tools must be a list, got {type(tools).__name__}")
    return [_tool(tool, position, strict) for position, tool in enumerate(tools or ())]


def check_names(tools: Iterable[Mapping[str, Any]]) -> None:
    """Refuse two tools of one name. For a request: LangChain programs bind such tools, and pass."""
    seen = set()
    for name in names(tools):
        if name in seen:
            raise InvalidRequestError(f"two tools are named {name!r}; calls could not tell them")
        seen.add(name)


def names(tools: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of OpenAI tool dicts."""
    return [tool["function"]["name"] for tool in tools]


def _tool(tool: Any, position: int, strict: bool | None) -> dict[str, Any]:
    if isinstance(tool, Mapping) and tool.get("type", "function") not in _LOCAL_KINDS:
        raise InvalidRequestError(
            f"tool {position} is {tool.get('type')!r}, which a provider runs; there is none here"
        )
    try:
        function = convert_to_openai_function(_plain(tool), strict=strict)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequestError(
            f"tool {position} ({type(tool).__name__}) is no tool: {error!s:.300}"
        ) from error
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"tool {position} has no name, got {name!r}")
    return {"type": "function", "function": function}


def _plain(tool: Any) -> Any:
    """What core's conversion would pass through or trip over, as what it takes."""
    if _is_dataclass(tool):
        return to_schema(tool).tool()["function"]
    if not isinstance(tool, Mapping):
        # A tool with a kind of its own (a custom tool of OpenAI's) has no JSON arguments.
        converted = convert_to_openai_tool(tool)
        if converted.get("type") != "function":
            raise ValueError(f"its type is {converted.get('type')!r}, not 'function'")
        return converted["function"]
    tool = dict(tool)
    if "function" in tool:
        tool = dict(tool["function"])
    if "name" in tool and "input_schema" not in tool and "toolSpec" not in tool:
        tool["parameters"] = tool.get("parameters") or {"type": "object", "properties": {}}
    return tool


def to_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str | dict[str, Any] | None:
    """A tool_choice in anybody's form -> "none", "auto", "required", or OpenAI's dict of a name.

    "any" and True mean "required", False means "none", None is left open (auto). Raises
    InvalidRequestError for a name that is not among `tools`, and for any choice among none.

    >>> to_choice("any", [Schema("add", {}).tool()])
    'required'
    """
    if choice is None:
        return None
    check_choice(choice, tools)
    if isinstance(choice, bool):
        choice = "required" if choice else "none"
    if isinstance(choice, Mapping):
        choice = _chosen(choice)
    if not isinstance(choice, str):
        raise InvalidRequestError(f"tool_choice must be a str, a dict or a bool, got {choice!r}")
    known = names(tools)
    if choice in _WORDS and choice not in known:
        return _WORDS[choice]
    if choice not in known:
        guess = nearest(choice, known)
        hint = f"; did you mean {guess!r}?" if guess else ""
        there = ", ".join(map(repr, known))
        raise InvalidRequestError(
            f"tool_choice names {choice!r}, which is no tool of this request"
            f" (there are: {there}){hint}"
        )
    return {"type": "function", "function": {"name": choice}}


def _chosen(choice: Mapping[str, Any]) -> Any:
    """The word or the name in a dict: OpenAI's (both), Anthropic's."""
    inner = choice.get("function", choice)
    unknown = set(choice) - {"type", "function", "name"}
    kind = choice.get("type", "function")
    if unknown or not isinstance(inner, Mapping):
        raise InvalidRequestError(f"tool_choice is no choice of a tool: {dict(choice)!r:.200}")
    if kind in ("function", "tool") and isinstance(inner.get("name"), str):
        return inner["name"]
    if kind in _WORDS and set(choice) == {"type"}:
        return kind
    raise InvalidRequestError(f"tool_choice is no choice of a tool: {dict(choice)!r:.200}")


def to_response_format(wanted: Any, strict: bool | None = None) -> dict[str, Any]:
    """OpenAI's response_format, from itself or from whatever has a schema (see `to_schema`).

    >>> to_response_format({"type": "json_object"})
    {'type': 'json_object'}
    """
    if isinstance(wanted, Mapping) and wanted.get("type") in _FORMATS:
        return dict(wanted)
    if isinstance(wanted, Mapping | type):
        return to_schema(wanted).format(strict)
    raise InvalidRequestError(
        f"response_format must be a dict with type {', '.join(_FORMATS)}, a JSON schema or a class"
        f" that has one, got {wanted!r:.200}"
    )


def to_schema(source: Any) -> Schema:
    """The JSON schema of a pydantic class (1 or 2), TypedDict, dataclass, or dict.

    A dict is a JSON schema, or an OpenAI function, tool or response_format that holds one.
    """
    try:
        if isinstance(source, Mapping):
            return _schema_of_dict(source)
        if _is_dataclass(source):
            return _titled(TypeAdapter(source).json_schema(), source.__name__)
        if hasattr(source, "model_json_schema"):
            return _titled(source.model_json_schema(), source.__name__)
        if isinstance(source, type) and hasattr(source, "schema"):
            return _titled(source.schema(), source.__name__)
        if isinstance(source, type):
            return _schema_of_dict(convert_to_openai_function(source))
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(
            f"no JSON schema can be made of {source!r:.200}: {error!s:.300}"
        ) from error
    raise InvalidRequestError(
        "a schema must be a pydantic class, a TypedDict, a dataclass or a dict,"
        f" got {type(source).__name__}"
    )


def _schema_of_dict(source: Mapping[str, Any]) -> Schema:
    held = {"function": "function", "json_schema": "json_schema"}.get(str(source.get("type")))
    if held and isinstance(source.get(held), Mapping):
        source = source[held]
    for key in ("parameters", "input_schema", "schema"):
        if "name" in source and isinstance(source.get(key), Mapping):
            return Schema(str(source["name"]), dict(source[key]), source.get("description"))
    return _titled(dict(source), "response")


def _titled(schema: dict[str, Any], otherwise: str) -> Schema:
    """The name is the title where that is one; titles may be whole sentences."""
    title = schema.get("title")
    name = title if isinstance(title, str) and title.isidentifier() else otherwise
    about = schema.get("description")
    return Schema(name, schema, about if isinstance(about, str) else None)


def _is_dataclass(source: Any) -> bool:
    return isinstance(source, type) and dataclasses.is_dataclass(source)


def from_calls(calls: Iterable[ToolCall]) -> tuple[list[ParsedCall], list[InvalidToolCall]]:
    """Calls of the engine -> LangChain's, those whose arguments are no JSON object apart.

    >>> valid, invalid = from_calls([ToolCall(0, "c1", "add", '{"a": 1}')])
    >>> valid[0]["args"], invalid
    ({'a': 1}, [])
    """
    valid: list[ParsedCall] = []
    invalid: list[InvalidToolCall] = []
    for call in calls:
        try:
            arguments = json.loads(call.arguments or "{}")
            if not isinstance(arguments, dict):
                raise ValueError(f"it is of type {type(arguments).__name__}")
            valid.append(tool_call(name=call.name or "", args=arguments, id=call.id))
        except ValueError as error:
            reason = f"the arguments are no JSON object: {error}"
            invalid.append(
                invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=reason)
            )
    return valid, invalid
