"""The names of all options, their aliases, and who wins when several layers set one.

Values are checked by the engine, once; here only names are, and whether an option can act at all.
Layers, strongest first: the call, what was bound to it, the constructor, the model's own generation
defaults (which the engine knows). An option counts as set in a layer when it is there and not None,
so `temperature=0` beats a default.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import at_load
from .errors import InvalidRequestError, UnknownOptionError, UnsupportedModelError

CHOOSING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")
"""How the next token is chosen; a layer that says greedy says so about all of them."""

SAMPLING = (
    *CHOOSING, "max_tokens", "min_tokens", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs",
    "top_logprobs", "skip_special_tokens",
)  # fmt: skip
"""What the sampler and the stop rule know."""

TEMPLATE = (
    "tools", "documents", "add_generation_prompt", "continue_final_message",
    "template_variables", "parse_special_in_content", "add_special_tokens",
)  # fmt: skip
"""How a prompt is made of messages (or of text: `add_special_tokens`)."""

SHAPES = ("response_format", "regex", "choice", "grammar")
"""What the answer must look like; a layer that sets one of them says so about all of them."""

CONSTRAINT = (*SHAPES, "tool_choice", "parallel_tool_calls")
"""What the grammar of an answer is made of, besides the tools themselves."""

RESPONSE = ("tool_style", "reasoning")
"""How calls and thoughts are written; `reasoning` False also tells the template."""

TEXT_REQUEST = (*SAMPLING, *SHAPES, "n", "add_special_tokens", "timeout", "priority", "adapter")
"""What a text prompt may ask for."""

CHAT_REQUEST = (*SAMPLING, *CONSTRAINT, *RESPONSE, "n", "documents", "add_generation_prompt",
                "continue_final_message", "template_variables", "parse_special_in_content",
                "timeout", "priority", "adapter")  # fmt: skip
"""What a LangChain conversation may ask for, besides tools."""

REQUEST = (*SAMPLING, *CONSTRAINT, *RESPONSE, *TEMPLATE, "n", "prompt_logprobs", "timeout",
           "priority", "adapter")  # fmt: skip
"""Everything that one request may carry. `timeout`: seconds for the whole request; `priority`: who
has the higher one runs first, -100 to 100, 0 by itself; `adapter`: the name of one of the model's
`adapters`, or the directory of another, which is loaded when it is first asked for."""

REMOTE = ("extra_body", "truncate", "watermark", "max_retries", "stream_usage")
"""What a request to a server may ask for besides. `extra_body`: fields of its JSON, as they are;
`max_retries`: attempts after the first; `stream_usage` False: do not ask for token counts."""

MODEL = (
    "device", "context_size", "threads", "chat_template", "kv_cache_bytes", "kv_cache_dtype",
    "max_sequences", "prefix_cache", "speculation", "draft_model", "adapters", "quantization",
    "quantization_config", "quantization_cache", "revision", "cache_dir", "token",
    "local_files_only",
)  # fmt: skip
"""How a model is found and opened."""

ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "random_seed": "seed",
    "chat_template_kwargs": "template_variables",
    "request_timeout": "timeout",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "enable_thinking": "reasoning",
    "num_return_sequences": "n",
    "model_id": "model",
    "model_name": "model",
    "repo_id": "model",
    "n_ctx": "context_size",
    "num_ctx": "context_size",
    "n_threads": "threads",
    "num_threads": "threads",
    "type_k": "kv_cache_dtype",
    "type_v": "kv_cache_dtype",
    "cache_type_k": "kv_cache_dtype",
    "cache_type_v": "kv_cache_dtype",
    "cache_folder": "cache_dir",
    "huggingfacehub_api_token": "token",
    "use_auth_token": "token",
    "base_url": "endpoint_url",
    "inference_server_url": "endpoint_url",
}
"""Other libraries' names -> ours. The only such table."""

_BEAMS = "one sequence is decoded, by sampling or greedily; beam search is not supported"
_PROCESSOR = "custom Python processors do not run inside the engine"
_MASKS = "this processor is not supported; logit_bias can forbid or favour single tokens"
_FREE_OF_PAD = "nothing is ever padded, so no pad token is needed: leave it out"
_OWN_TYPES = (
    "weights are used in the types of their file; choose another file, e.g. owner/name:Q8_0, or"
    " quantization"
)
_CONFIG = "give quantization_config, or quantization"

UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "extra_body": ((), "there is no server to send it to; it is for HuggingFaceEndpoint"),
    "functions": ((), "use tools"),
    "function_call": ((), "use tool_choice"),
    "guided_json": ((), "use response_format"),
    "best_of": ((1,), "use n, and choose among the answers"),
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0, 0.0), _BEAMS),
    "length_penalty": ((1, 1.0), _BEAMS),
    "early_stopping": ((False,), _BEAMS),
    "penalty_alpha": ((0, 0.0), "contrastive search is not supported"),
    "no_repeat_ngram_size": ((0,), "use repetition_penalty or frequency_penalty"),
    "encoder_no_repeat_ngram_size": ((0,), "there is no encoder"),
    "encoder_repetition_penalty": ((1, 1.0), "there is no encoder"),
    "bad_words_ids": ((), _MASKS),
    "force_words_ids": ((), _MASKS),
    "suppress_tokens": ((), _MASKS),
    "begin_suppress_tokens": ((), _MASKS),
    "sequence_bias": ((), _MASKS),
    "forced_bos_token_id": ((), _MASKS),
    "forced_eos_token_id": ((), _MASKS),
    "exponential_decay_length_penalty": ((), "not supported"),
    "epsilon_cutoff": ((0, 0.0), "use min_p"),
    "eta_cutoff": ((0, 0.0), "use min_p"),
    "top_h": ((), "use top_p or min_p"),
    "guidance_scale": ((1, 1.0), "classifier-free guidance is not supported"),
    "watermark": ((False,), "watermarks are not supported"),
    "watermarking_config": ((), "watermarks are not supported"),
    "logits_processor": ((), _PROCESSOR),
    "stopping_criteria": ((), f"{_PROCESSOR}; use stop"),
    "prefix_allowed_tokens_fn": ((), _PROCESSOR),
    "streamer": ((), "use stream()"),
    "generation_config": ((), "give its values as options"),
    "assistant_model": ((), "open the model with draft_model"),
    "prompt_lookup_num_tokens": ((), "speculation decides that itself; it can be switched off"),
    "max_length": ((), "it counts the prompt too; use max_tokens, which counts new tokens"),
    "min_length": ((0,), "it counts the prompt too; use min_tokens, which counts new tokens"),
    "max_time": ((), "use timeout"),
    "eos_token_id": (
        (),
        "the model's own end tokens end a completion; use stop_token_ids for more",
    ),
    "pad_token_id": ((), _FREE_OF_PAD),
    "use_cache": ((True,), "there is always a cache"),
    "cache_implementation": ((), "there is one cache; kv_cache_dtype is its type"),
    "truncate": ((), "prompts are never cut; shorten it yourself"),
    "truncation": ((False,), "prompts are never cut; shorten it yourself"),
    "padding": ((False,), _FREE_OF_PAD),
    "return_tensors": ((), "completions are text"),
    "clean_up_tokenization_spaces": ((False,), "text is what the tokens say"),
    "output_scores": ((False,), "use logprobs"),
    "output_logits": ((False,), "use logprobs, or Engine.logits()"),
    "return_dict_in_generate": ((False,), "completions are text"),
    "torch_dtype": (("auto",), _OWN_TYPES),
    "dtype": (("auto",), _OWN_TYPES),
    "load_in_8bit": ((False,), _CONFIG),
    "load_in_4bit": ((False,), _CONFIG),
    "trust_remote_code": ((False,), "code that comes with a model is never run"),
    "attn_implementation": ((), "there is one implementation"),
    "low_cpu_mem_usage": ((True, False), "files are memory-mapped"),
    "max_memory": ((), "use context_size or kv_cache_bytes"),
    "offload_folder": ((), "weights stay in memory"),
    "use_safetensors": ((True,), "pickled weights are never read"),
    "use_fast": ((True,), "there is one tokenizer"),
    "tokenizer": ((), "the tokenizer comes with the model"),
}
"""Options of other libraries that do not run here: the values that ask for nothing, and why not."""

BOUND = "bound_options"
"""The keyword under which `mark_bound` notes names."""


def canonical(options: Mapping[str, Any], known: Iterable[str] = REQUEST) -> dict[str, Any]:
    """One layer's options under their own names, without those that are None.

    Raises UnknownOptionError (with the nearest known name) for a name outside `known`, and
    InvalidRequestError for a known one that is not supported, or for two names of one option with
    different values.

    >>> canonical({"max_new_tokens": 5, "stop": "END", "seed": None})
    {'max_tokens': 5, 'stop': ['END']}
    """
    known = tuple(known)
    result: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in options.items():
        option = ALIASES.get(name, name)
        if option not in known:
            _refuse(name, option, value, known)
            continue
        if value is None:
            continue
        value = _READ[option](value) if option in _READ else value
        if option in result and not _same(result[option], value):
            raise InvalidRequestError(
                f"{given_as[option]}={result[option]!r} and {name}={value!r}"
                f" are the same option, {option}, with different values"
            )
        result[option] = value
        given_as[option] = name
    return result


def merge(*layers: Mapping[str, Any], known: Iterable[str] = REQUEST) -> dict[str, Any]:
    """The layers as one, strongest first: each option from the first layer that sets it.

    A layer that decides whether to sample (do_sample, or a temperature) overrules what weaker ones
    say against it: greedy in a call drops the constructor's top_p, a call's temperature its
    do_sample=False. So does one that says what the answer must look like (one of SHAPES).

    >>> merge({"max_new_tokens": 5}, {"max_tokens": 9, "temperature": 0.7}, {"do_sample": False})
    {'max_tokens': 5, 'temperature': 0.7}
    """
    known = tuple(known)
    result: dict[str, Any] = {}
    sampled: bool | None = None
    for layer in layers:
        named = canonical(layer, known)
        if sampled is not None:
            named = {n: v for n, v in named.items() if not _against(sampled, n, v)}
        if any(shape in result for shape in SHAPES):
            named = {n: v for n, v in named.items() if n not in SHAPES}
        sampled = _decision(named) if sampled is None else sampled
        result = named | result
    return result


def _decision(layer: Mapping[str, Any]) -> bool | None:
    """Whether a layer wants sampling; None when it leaves that open."""
    temperature = layer.get("temperature")
    if layer.get("do_sample") is False or temperature == 0:
        return False
    return True if layer.get("do_sample") or temperature is not None else None


def _against(sampled: bool, name: str, value: object) -> bool:
    """Whether an option of a weaker layer contradicts the decision of a stronger one."""
    if not sampled:
        return name in CHOOSING
    return (name == "do_sample" and value is False) or (name == "temperature" and value == 0)


def combine(*parts: Mapping[str, Any], known: Iterable[str] = REQUEST) -> dict[str, Any]:
    """Parts of one layer as one; the same option twice with different values is an error."""
    known = tuple(known)
    result: dict[str, Any] = {}
    for part in parts:
        for name, value in canonical(part, known).items():
            if name in result and not _same(result[name], value):
                raise InvalidRequestError(
                    f"{name} is given twice, as {result[name]!r} and as {value!r}"
                )
            result[name] = value
    return result


def request(given: Mapping[str, Any], *, messages: bool) -> dict[str, Any]:
    """One request's options as the engine takes them, none of them without effect.

    `messages`: the prompt is a conversation, not a text or tokens. Raises what `canonical` and
    `check_choice` do, and InvalidRequestError for a style of calls where none can be.

    >>> request({"max_new_tokens": 5}, messages=False)
    {'max_tokens': 5}
    """
    named = canonical(given)
    check_choice(named.get("tool_choice"), named.get("tools"))
    if "tool_style" in named and not messages:
        raise InvalidRequestError(
            f"tool_style={named['tool_style']!r:.200} applies to messages only; the prompt is text"
        )
    return named


def check_choice(choice: object, tools: object) -> None:
    """Refuse to choose among no tools, whatever the choice; None is no choice."""
    if choice is not None and not tools:
        raise InvalidRequestError(f"tool_choice is {choice!r:.200}, but there are no tools")


def mark_bound(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `bind`, with a note of their names.

    LangChain mixes them with those of the call, and a call's max_new_tokens must win over a bound
    max_tokens.
    """
    return {**kwargs, BOUND: tuple(kwargs)}


def call_layers(
    kwargs: Mapping[str, Any], stop: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a LangChain model is called with -> (the call's own, what was bound)."""
    everything = {**kwargs} if stop is None else {**kwargs, "stop": stop}
    bound_names = everything.pop(BOUND, ())
    bound = {name: everything.pop(name) for name in bound_names if name in everything}
    return everything, bound


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when none is."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def unknown(name: str, known: Iterable[str]) -> UnknownOptionError:
    """The error for a name that nobody knows."""
    of_chats = name in CHAT_REQUEST and name not in TEXT_REQUEST
    guess = None if of_chats else nearest(name, known)
    hint = f"; did you mean {guess!r}?" if guess else ""
    hint = "; it belongs to a chat's request: use ChatHuggingFace" if of_chats else hint
    hint = "; tools belong to a chat's request: use bind_tools" if name == "tools" else hint
    return UnknownOptionError(f"unknown option {name!r}{hint}", name=name, nearest=guess)


def device(value: object) -> str:
    """A device as other libraries write it -> ours: None, -1 and "cpu" are "cpu"."""
    if value is None or value == "auto" or value == -1:
        return "cpu"
    if value in ("cpu", "reference"):
        return str(value)
    name = str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        name = f"cuda:{value}"
    if name.startswith("cuda"):
        raise UnsupportedModelError(
            f"device {name!r} is not supported yet; supported: 'cpu', 'reference'",
            what="device",
            name=name,
        )
    raise UnsupportedModelError(
        f"unsupported device {name!r}; supported: 'cpu', 'reference'", what="device", name=name
    )


_KV_CACHE_DTYPES = {
    "f16": "f16", "fp16": "f16", "float16": "f16", "half": "f16", "auto": "f16", 1: "f16",
    "int8": "int8", "q8_0": "int8", 8: "int8",
}  # fmt: skip
"""What the cache's types are called elsewhere; numbers are GGML's."""


def kv_cache_dtype(value: object) -> str:
    """The type of the cache as other libraries write it -> ours.

    >>> kv_cache_dtype("q8_0"), kv_cache_dtype("auto")
    ('int8', 'f16')
    """
    plain = isinstance(value, (str, int)) and not isinstance(value, bool)
    name = _KV_CACHE_DTYPES.get(value) if plain else None
    if name is None:
        known = ", ".join(map(repr, dict.fromkeys(_KV_CACHE_DTYPES.values())))
        raise InvalidRequestError(f"kv_cache_dtype must be one of {known}, got {value!r:.200}")
    return name


def adapters(value: object) -> tuple[tuple[str, str], ...]:
    """LoRA adapters as (name, directory): given as a dict, or as a list of directories.

    >>> [name for name, _ in adapters({"legal": "/models/legal"})]
    ['legal']
    """
    pairs: list[Any]
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        pairs = [item if isinstance(item, tuple | list) else (item, item) for item in value]
    else:
        raise InvalidRequestError(
            f"adapters must be a dict of names and directories, or a list of directories,"
            f" got {value!r:.200}"
        )
    try:
        return tuple((os.fspath(name), str(Path(d).expanduser().absolute())) for name, d in pairs)
    except (TypeError, ValueError):
        raise InvalidRequestError(
            f"adapters must be names and directories, got {value!r:.200}"
        ) from None


def _adapter(value: object) -> object:
    """A directory as text; what is neither that nor text is left for the engine to refuse."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _refuse(name: str, option: str, value: object, known: tuple[str, ...]) -> None:
    """Raise for an option outside `known`, unless its value asks for nothing."""
    if option not in UNSUPPORTED:
        raise unknown(name, (*known, *(a for a, o in ALIASES.items() if o in known)))
    neutral, reason = UNSUPPORTED[option]
    if value is None or any(value is n or (_plain(value) and value == n) for n in neutral):
        return
    raise InvalidRequestError(f"{name}={value!r:.200} is not supported: {reason}")


def _plain(value: object) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _same(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except Exception:  # a value whose == is not a bool (an array): equal only if it is the same
        return one is other


def _stops(value: object) -> object:
    """A single stop string is a list of one. What is neither is left for the engine to refuse."""
    return [value] if isinstance(value, str) else value


_READ: dict[str, Callable[[object], object]] = {
    "stop": _stops,
    "kv_cache_dtype": kv_cache_dtype,
    "quantization_config": at_load.config,
    "adapters": adapters,
    "adapter": _adapter,
}
"""Options that have several forms."""
