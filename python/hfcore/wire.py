"""A request's options and messages as the fields of what a server takes.

Pure: nothing is sent here, and no value is checked that the server checks. What has no place in a
kind of request is refused, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .engine import Prompt
from .errors import InvalidRequestError

CHAT, COMPLETION, GENERATE = "chat", "completion", "generate"

_FIELDS = (
    "max_tokens", "temperature", "top_p", "stop", "seed", "n", "presence_penalty",
    "frequency_penalty", "logprobs", "top_logprobs", "response_format", "tool_choice",
    "parallel_tool_calls",
)  # fmt: skip
"""Options that a chat's request has a field for in OpenAI's API, of the same name."""

_BESIDE = (
    "top_k", "repetition_penalty", "typical_p", "min_p", "min_tokens", "ignore_eos",
    "stop_token_ids", "skip_special_tokens",
)  # fmt: skip
"""Options that servers of open models take beside OpenAI's."""

_OF_TEMPLATES = ("add_generation_prompt", "continue_final_message", "documents")

_OF_OUTPUT = ("regex", "choice", "grammar")

_OF_COMPLETIONS = (
    "max_tokens", "temperature", "top_p", "stop", "seed", "n", "presence_penalty",
    "frequency_penalty", "response_format", "add_special_tokens",
)  # fmt: skip

_OF_GENERATION = {
    "max_tokens": "max_new_tokens", "temperature": "temperature", "top_k": "top_k",
    "top_p": "top_p", "typical_p": "typical_p", "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty", "seed": "seed", "stop": "stop",
    "do_sample": "do_sample", "truncate": "truncate", "watermark": "watermark",
    "top_logprobs": "top_n_tokens", "adapter": "adapter_id",
}  # fmt: skip
"""Options -> parameters of TGI's text generation."""

_REFUSED = {
    "priority": "servers order their requests themselves",
    "adapter": "a server names its adapters as models: use model",
    "tool_style": "the server writes and reads the calls of its model",
    "parse_special_in_content": "the server tokenizes, and has no field for it",
    "prompt_logprobs": "chat completions have no field for it",
    "add_special_tokens": "it is of text prompts; the server's chat template decides",
    "truncate": "prompts are cut in TGI's text generation only",
    "watermark": "TGI's text generation alone has watermarks",
}

_NEEDS_OPENAI = "TGI's text generation has no parameter for it; give a URL that ends in /v1"


def bodies(
    routes: Sequence[str],
    prompt: Prompt,
    tools: Sequence[Mapping[str, Any]] | None,
    wishes: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """What a request holds, by each route that has a place for all that is asked.

    A chat stands in for a text's own routes where a server lacks these, not where they lack an
    option: the first complaint is raised then.
    """
    found: dict[str, dict[str, Any]] = {}
    refused: InvalidRequestError | None = None
    for route in routes:
        try:
            found[route] = _body(route, prompt, tools, wishes)
        except InvalidRequestError as error:
            refused = refused or error
    meant = [route for route in routes if route != CHAT] or routes
    if refused and not set(found) & set(meant):
        raise refused
    return found


def _body(
    route: str,
    prompt: Prompt,
    tools: Sequence[Mapping[str, Any]] | None,
    wishes: Mapping[str, Any],
) -> dict[str, Any]:
    """What a request of this kind holds. Raises InvalidRequestError for what has no place in it."""
    if route == GENERATE:
        return generation_parameters(wishes)
    if route == COMPLETION:
        return {"prompt": prompt, **completion_fields(wishes)}
    messages = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else wire_messages(prompt, thoughts=wishes.get("reasoning") is True)
    )
    fields = {"messages": messages, **chat_fields(wishes)}
    return fields if not tools else {**fields, "tools": list(tools), **_one_choice(fields, tools)}


def _one_choice(fields: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A call that must be, of the only tool there is: by its name, which more servers know."""
    several = fields.get("parallel_tool_calls") is True or len(tools) > 1
    if several or fields.get("tool_choice") != "required":
        return {}
    name = tools[0]["function"]["name"]
    return {"tool_choice": {"type": "function", "function": {"name": name}}}


def chat_fields(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Options as fields of a chat completion.

    >>> chat_fields({"max_tokens": 5, "top_k": 3, "do_sample": False})
    {'max_tokens': 5, 'top_k': 3, 'temperature': 0}
    """
    rest = dict(wishes)
    fields = {name: rest.pop(name) for name in (*_FIELDS, *_BESIDE, *_OF_TEMPLATES) if name in rest}
    fields |= _temperature(rest.pop("do_sample", None), fields.get("temperature"))
    fields |= _biases(rest.pop("logit_bias", None))
    fields |= _constrained(rest)
    if fields.get("top_logprobs") is not None:
        fields["logprobs"] = True
    variables = dict(rest.pop("template_variables", None) or {})
    if "reasoning" in rest:
        variables["enable_thinking"] = rest.pop("reasoning")
    fields |= {"chat_template_kwargs": variables} if variables else {}
    for name, value in rest.items():
        _refuse(name, value, _REFUSED.get(name, "chat completions have no field for it"))
    return fields


def completion_fields(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Options as fields of a text completion in OpenAI's form."""
    rest = dict(wishes)
    fields = {name: rest.pop(name) for name in (*_OF_COMPLETIONS, *_BESIDE) if name in rest}
    fields |= _temperature(rest.pop("do_sample", None), fields.get("temperature"))
    fields |= _biases(rest.pop("logit_bias", None))
    fields |= _constrained(rest)
    asked, top = rest.pop("logprobs", None), rest.pop("top_logprobs", None)
    if asked or top is not None:
        fields["logprobs"] = top or 0
    for name, value in rest.items():
        _refuse(name, value, _REFUSED.get(name, "text completions have no field for it"))
    return fields


def generation_parameters(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Options as parameters of TGI's text generation.

    >>> generation_parameters({"max_tokens": 5, "temperature": 0})
    {'max_new_tokens': 5, 'do_sample': False}
    """
    rest = dict(wishes)
    parameters = {theirs: rest.pop(n) for n, theirs in _OF_GENERATION.items() if n in rest}
    if parameters.get("temperature") == 0:  # it takes no 0
        del parameters["temperature"]
        parameters["do_sample"] = False
    parameters |= _grammar(rest)
    rest.pop("logprobs", None)  # they come in any case
    if rest.get("n") == 1:
        del rest["n"]
    for name, value in rest.items():
        reason = _REFUSED.get(name, _NEEDS_OPENAI)
        _refuse(name, value, reason if name != "add_special_tokens" else _NEEDS_OPENAI)
    return parameters


def _refuse(name: str, value: Any, reason: str) -> None:
    raise InvalidRequestError(f"{name}={value!r:.100} cannot be sent to a server: {reason}")


def _temperature(do_sample: Any, temperature: Any) -> dict[str, Any]:
    """do_sample, which these servers say by the temperature."""
    if do_sample is None or (do_sample and temperature):
        return {}
    if do_sample and temperature == 0:
        raise InvalidRequestError("do_sample=True and temperature=0 contradict")
    return {"temperature": 1.0 if do_sample else 0}


def _biases(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"logit_bias must be a dict, got {type(given).__name__}")
    return {"logit_bias": {str(token): bias for token, bias in given.items()}}


def _constrained(rest: dict[str, Any]) -> dict[str, Any]:
    """What an answer must look like, besides response_format: vLLM's field."""
    found = {name: rest.pop(name) for name in _OF_OUTPUT if name in rest}
    return {"structured_outputs": found} if found else {}


def _grammar(rest: dict[str, Any]) -> dict[str, Any]:
    """What an answer must look like, as TGI says it."""
    asked = rest.pop("response_format", None)
    if "regex" in rest:
        if asked is not None:
            raise InvalidRequestError(
                f"regex={rest['regex']!r:.100} and response_format={asked!r:.100} both say what an"
                " answer looks like: give one"
            )
        return {"grammar": {"type": "regex", "value": rest.pop("regex")}}
    if asked is None or asked.get("type") == "text":
        return {}
    schema = {"type": "object"}
    if asked.get("type") == "json_schema":
        schema = asked["json_schema"]["schema"]
    return {"grammar": {"type": "json", "value": schema}}


def wire_messages(
    messages: Sequence[Mapping[str, Any]], *, thoughts: bool = False
) -> list[dict[str, Any]]:
    """Messages as OpenAI's API has them: arguments are text, a tool's result has no name.

    `thoughts`: earlier ones are sent back, as reasoning_content.

    >>> wire_messages([{"role": "tool", "name": "add", "tool_call_id": "c", "content": "3"}])
    [{'role': 'tool', 'tool_call_id': 'c', 'content': '3'}]
    """
    return [_wire(message, thoughts) for message in messages]


def _wire(message: Mapping[str, Any], thoughts: bool) -> dict[str, Any]:
    sent = dict(message)
    if sent["role"] == "tool":
        sent.pop("name", None)
    if not thoughts:
        sent.pop("reasoning_content", None)
    if sent.get("tool_calls"):
        sent["tool_calls"] = [_wire_call(call) for call in sent["tool_calls"]]
    return sent


def _wire_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}
