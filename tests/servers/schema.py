"""What servers take: OpenAI's chat, completion and embedding requests, TGI's and TEI's.

`refusal` says in a server's words what is wrong with a request, or None. Extensions are what vLLM,
TGI, SGLang and llama.cpp take beside OpenAI's fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], None]


class Refused(Exception):  # noqa: N818  # an answer, not an error
    """What is wrong, and where."""


# Kinds of values --------------------------------------------------------------------------------


def _wrong(at: str, wanted: str, value: Any) -> Refused:
    return Refused(f"{at}: expected {wanted}, got {value!r:.80}")


def anything(value: Any, at: str) -> None:
    """Nothing to check."""


def boolean(value: Any, at: str) -> None:
    if not isinstance(value, bool):
        raise _wrong(at, "a boolean", value)


def number(low: float | None = None, high: float | None = None, *, above: bool = False) -> Check:
    """A number of low to high; `above`: more than low."""

    def check(value: Any, at: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(at, "a number", value)
        _in_range(value, at, low, high, above=above)

    return check


def integer(low: int | None = None, high: int | None = None) -> Check:
    def check(value: Any, at: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(at, "an integer", value)
        _in_range(value, at, low, high)

    return check


def _in_range(
    value: float, at: str, low: float | None, high: float | None, *, above: bool = False
) -> None:
    if low is not None and (value < low or (above and value == low)):
        raise Refused(f"{at}: must be {'more than' if above else 'at least'} {low}, got {value}")
    if high is not None and value > high:
        raise Refused(f"{at}: must be at most {high}, got {value}")


def string(pattern: str = r".*") -> Check:
    form = re.compile(pattern, re.DOTALL)

    def check(value: Any, at: str) -> None:
        if not isinstance(value, str) or not form.fullmatch(value):
            raise _wrong(at, f"a string {pattern if pattern != '.*' else ''}".strip(), value)

    return check


def word(*words: str) -> Check:
    def check(value: Any, at: str) -> None:
        if value not in words or not isinstance(value, str):
            raise _wrong(at, f"one of {', '.join(words)}", value)

    return check


def array(of: Check, *, most: int | None = None, least: int = 0) -> Check:
    def check(value: Any, at: str) -> None:
        if not isinstance(value, list):
            raise _wrong(at, "an array", value)
        if len(value) < least or (most is not None and len(value) > most):
            raise Refused(f"{at}: must have {least} to {most} items, got {len(value)}")
        for position, item in enumerate(value):
            of(item, f"{at}.{position}")

    return check


def dictionary(of: Check, keys: Check = anything) -> Check:
    def check(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(at, "an object", value)
        for name, item in value.items():
            keys(name, f"{at}.{name}")
            of(item, f"{at}.{name}")

    return check


def thing(fields: Mapping[str, Check], *needed: str) -> Check:
    """An object of these fields and no others."""

    def check(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(at, "an object", value)
        for name in needed:
            if name not in value:
                raise Refused(f"{at}.{name}".lstrip(".") + ": field required")
        for name, item in value.items():
            if name not in fields:
                place = f" in {at}" if at else ""
                raise Refused(f"Unrecognized request argument supplied{place}: {name}")
            fields[name](item, f"{at}.{name}".lstrip("."))

    return check


def either(*kinds: Check) -> Check:
    """Whichever fits; the last one's complaint if none does."""

    def check(value: Any, at: str) -> None:
        for kind in kinds[:-1]:
            try:
                return kind(value, at)
            except Refused:
                continue
        return kinds[-1](value, at)

    return check


def kinds(by_type: Mapping[str, Check], field: str = "type") -> Check:
    """An object whose field says which kind it is."""

    def check(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(at, "an object", value)
        word(*by_type)(value.get(field), f"{at}.{field}")
        by_type[value[field]](value, at)

    return check


def nothing(value: Any, at: str) -> None:
    if value is not None:
        raise _wrong(at, "null", value)


# Messages ---------------------------------------------------------------------------------------

NAME = string(r"[A-Za-z0-9_-]{1,64}")
_SPEAKER = string(r"[^\s<|\\/>]+")
_SCHEMA = dictionary(anything)
_TEXT_PART = thing({"type": anything, "text": string()}, "text")
_URL = string(r"(https?://|data:[\w.+-]+/[\w.+-]+;base64,).+")
_PARTS = {
    "text": _TEXT_PART,
    "image_url": thing(
        {"type": anything,
         "image_url": thing({"url": _URL, "detail": word("auto", "low", "high")}, "url")},
        "image_url",
    ),
    "input_audio": thing(
        {"type": anything,
         "input_audio": thing({"data": string(r"[A-Za-z0-9+/=]+"), "format": word("wav", "mp3")},
                              "data", "format")},
        "input_audio",
    ),
    "file": thing(
        {"type": anything,
         "file": thing({"file_data": string(), "file_id": string(), "filename": string()})},
        "file",
    ),
}  # fmt: skip
_MORE_PARTS = {
    "video_url": thing({"type": anything, "video_url": thing({"url": _URL}, "url")}, "video_url"),
    "audio_url": thing({"type": anything, "audio_url": thing({"url": _URL}, "url")}, "audio_url"),
}
_CALL = thing(
    {"id": string(r".+"), "type": word("function"),
     "function": thing({"name": NAME, "arguments": string()}, "name", "arguments")},
    "id", "type", "function",
)  # fmt: skip


def _messages(parts: Mapping[str, Check], more: Mapping[str, Check]) -> Check:
    words = either(string(), array(_TEXT_PART, least=1))
    seen = either(string(), array(kinds(parts), least=1))
    said = either(
        nothing, string(),
        array(kinds({"text": _TEXT_PART,
                     "refusal": thing({"type": anything, "refusal": string()})})),
    )  # fmt: skip
    system = thing({"role": anything, "content": words, "name": _SPEAKER}, "content")
    by_role = {
        "system": system,
        "developer": system,
        "user": thing({"role": anything, "content": seen, "name": _SPEAKER}, "content"),
        "assistant": thing(
            {"role": anything, "content": said, "name": _SPEAKER, "refusal": string(),
             "tool_calls": array(_CALL, least=1), **more},
        ),
        "tool": thing(
            {"role": anything, "content": words, "tool_call_id": string(r".+")},
            "content", "tool_call_id",
        ),
    }  # fmt: skip
    one = kinds(by_role, "role")

    def check(value: Any, at: str) -> None:
        array(one, least=1)(value, at)
        called: set[str] = set()
        for position, message in enumerate(value):
            where = f"{at}.{position}"
            called |= {call["id"] for call in message.get("tool_calls", ())}
            if message["role"] == "tool" and message["tool_call_id"] not in called:
                raise Refused(f"{where}: no tool call has the id {message['tool_call_id']}")
            if message["role"] == "assistant" and not {"content", "tool_calls"} & set(message):
                raise Refused(f"{where}.content: field required")

    return check


# Requests ---------------------------------------------------------------------------------------

_TOOL = thing(
    {"type": word("function"),
     "function": thing({"name": NAME, "description": string(), "parameters": _SCHEMA,
                        "strict": boolean}, "name")},
    "type", "function",
)  # fmt: skip
_FORMAT = kinds({
    "text": thing({"type": anything}),
    "json_object": thing({"type": anything}),
    "json_schema": thing(
        {"type": anything,
         "json_schema": thing({"name": NAME, "description": string(), "schema": _SCHEMA,
                               "strict": boolean}, "name", "schema")},
        "json_schema",
    ),
})  # fmt: skip
_STOP = either(string(r".+"), array(string(r".+"), most=4, least=1))
_SAMPLING: dict[str, Check] = {
    "model": string(r".+"),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "logit_bias": dictionary(number(-100, 100), string(r"\d+")),
    "max_tokens": integer(1),
    "n": integer(1, 128),
    "seed": integer(),
    "stop": _STOP,
    "stream": boolean,
    "stream_options": thing({"include_usage": boolean}),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "user": string(),
}
_CHAT: dict[str, Check] = {
    **_SAMPLING,
    "messages": _messages(_PARTS, {}),
    "max_completion_tokens": integer(1),
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
    "response_format": _FORMAT,
    "tools": array(_TOOL, least=1, most=128),
    "tool_choice": either(
        word("none", "auto", "required"),
        thing({"type": word("function"), "function": thing({"name": NAME}, "name")},
              "type", "function"),
    ),
    "parallel_tool_calls": boolean,
    "reasoning_effort": word("none", "minimal", "low", "medium", "high", "xhigh"),
    "metadata": dictionary(string()),
    "modalities": array(word("text", "audio")),
    "prediction": anything,
    "audio": anything,
    "service_tier": string(),
    "store": boolean,
    "verbosity": word("low", "medium", "high"),
    "prompt_cache_key": string(),
    "safety_identifier": string(),
    "web_search_options": anything,
}  # fmt: skip
_EXTENSIONS: dict[str, Check] = {
    "top_k": integer(-1),
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "repetition_penalty": number(0, above=True),
    "length_penalty": number(),
    "min_tokens": integer(0),
    "stop_token_ids": array(integer(0)),
    "ignore_eos": boolean,
    "skip_special_tokens": boolean,
    "include_stop_str_in_output": boolean,
    "do_sample": boolean,
    "watermark": boolean,
    "truncate": integer(1),
    "best_of": integer(1),
    "priority": integer(),
    "documents": array(anything),
    "add_generation_prompt": boolean,
    "add_special_tokens": boolean,
    "continue_final_message": boolean,
    "chat_template_kwargs": dictionary(anything),
    "guided_regex": string(),
    "guided_choice": array(string()),
    "guided_grammar": string(),
    "guided_json": anything,
    "structured_outputs": dictionary(anything),
    "regex": string(),
    "ebnf": string(),
    "grammar": string(),
    "tool_prompt": string(),
}
_COMPLETION: dict[str, Check] = {
    **_SAMPLING,
    "prompt": either(string(), array(string(), least=1)),
    "logprobs": integer(0, 5),
    "echo": boolean,
    "best_of": integer(1),
    "suffix": string(),
}
_PARAMETERS: dict[str, Check] = {
    "adapter_id": string(),
    "best_of": integer(1),
    "decoder_input_details": boolean,
    "details": boolean,
    "do_sample": boolean,
    "frequency_penalty": number(-2, 2),
    "grammar": kinds({
        "json": thing({"type": anything, "value": anything}, "value"),
        "regex": thing({"type": anything, "value": string()}, "value"),
        "json_schema": thing({"type": anything, "value": anything}, "value"),
    }),
    "max_new_tokens": integer(1),
    "repetition_penalty": number(0, above=True),
    "return_full_text": boolean,
    "seed": integer(0),
    "stop": array(string(r".+"), most=4),
    "temperature": number(0, above=True),
    "top_k": integer(1),
    "top_n_tokens": integer(1),
    "top_p": number(0, 1, above=True),
    "truncate": integer(1),
    "typical_p": number(0, 1, above=True),
    "watermark": boolean,
}  # fmt: skip
_TEXTS = either(string(), array(string(), least=1))

STRICT: dict[str, Check] = {
    "chat": thing(_CHAT, "messages", "model"),
    "completion": thing(_COMPLETION, "prompt", "model"),
    "generate": thing(
        {"inputs": string(r".+"), "parameters": thing(_PARAMETERS), "stream": boolean}, "inputs"
    ),
    "embeddings": thing(
        {"input": _TEXTS, "model": string(r".+"), "encoding_format": word("float", "base64"),
         "dimensions": integer(1), "user": string()}, "input", "model",
    ),
    "features": thing(
        {"inputs": _TEXTS, "normalize": boolean, "prompt_name": string(), "truncate": boolean,
         "truncation_direction": word("left", "right", "Left", "Right"), "dimensions": integer(1)},
        "inputs",
    ),
}  # fmt: skip
"""A request's kind -> its check."""

_ASSISTANT = {"reasoning": string(), "reasoning_content": string()}
EXTENDED: dict[str, Check] = {
    **STRICT,
    "chat": thing(
        {**_CHAT, **_EXTENSIONS, "stop": either(string(), array(string())),
         "messages": _messages(_PARTS | _MORE_PARTS, _ASSISTANT)},
        "messages", "model",
    ),
    "completion": thing(
        {**_COMPLETION, **_EXTENSIONS, "stop": either(string(), array(string())),
         "response_format": _FORMAT},
        "prompt", "model",
    ),
}  # fmt: skip
"""The same, of servers that take more."""


def refusal(kind: str, body: Any, *, extensions: bool = False) -> str | None:
    """What a server says against the request; None when it takes it."""
    try:
        (EXTENDED if extensions else STRICT)[kind](body, "")
        if kind == "chat":
            _together(body)
        if body.get("stream_options") is not None and not body.get("stream"):
            raise Refused("The 'stream_options' parameter is only allowed when 'stream' is enabled")
    except Refused as refused:
        return str(refused)
    return None


def _together(body: Mapping[str, Any]) -> None:
    """What fields of a chat say about each other."""
    if "tools" not in body:
        for name in ("tool_choice", "parallel_tool_calls"):
            if name in body:
                raise Refused(f"'{name}' is only allowed when 'tools' are specified")
    choice = body.get("tool_choice")
    names = [tool["function"]["name"] for tool in body.get("tools", ())]
    if isinstance(choice, dict) and choice["function"]["name"] not in names:
        raise Refused(f"tool_choice: {choice['function']['name']} is none of the tools")
    if len(set(names)) < len(names):
        raise Refused("tools: names must differ")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise Refused("'top_logprobs' is only allowed when 'logprobs' is true")
    if {"max_tokens", "max_completion_tokens"} <= set(body):
        raise Refused("'max_tokens' and 'max_completion_tokens' exclude each other")
