"""ChatHuggingFace: LangChain's chat interface to a model, here or behind a server.

What is asked is put into a request here; what the forms of tools, schemas and messages are, is not.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, PrivateAttr, SecretStr
from typing_extensions import override

from . import options
from .backends import Backend, Deltas
from .endpoint import HuggingFaceEndpoint
from .engine import Completion, Delta
from .errors import HfcoreError, InvalidRequestError
from .llms import (
    ECHO,
    HuggingFacePipeline,
    TextModel,
    check_single,
    logprobs_dict,
    plain_errors,
    revivable,
    token_usage,
    totals,
)
from .messages import check_calls, to_dicts
from .placement import server_name
from .remote import WHOLE, Remote
from .structured import METHODS, Parser, Reader, with_raw
from .tools import check_names, from_calls, to_choice, to_response_format, to_schema, to_tools
from .transformers_backend import Transformers
from .urls import may_see_token

PROVIDER = "huggingface"
_REMOTE = ("remote", "endpoint", "text-gen")
"""Names of the backend that is a server."""
_FOR_ENDPOINT = (
    "endpoint_url", "provider", "headers", "bill_to", "server_kwargs", "client", "async_client",
    "truncate", "watermark", "extra_body",
)  # fmt: skip
_FOR_BOTH = ("model", "model_kwargs", "batch_size", "task", "token")
_FOR_LLM = (
    "model", "model_kwargs", "pipeline_kwargs", "batch_size", "device_map", "task", "pipeline",
    "backend", "fallback",
    *options.MODEL, *_FOR_ENDPOINT,
)  # fmt: skip
_IGNORED_IN_CALLS = ("stream", "streaming")
_OF_TEXTS = (*ECHO, "streaming", "add_special_tokens")
_NO_MATTER = ("timeout", "priority", "max_retries", "stream_usage")
"""Options that change no answer, for the key of caches."""


class ChatHuggingFace(BaseChatModel):
    """A Hugging Face chat model, run in this process, or by a server.

    Give it either `llm=HuggingFacePipeline(...)`, or `model=` (also model_id, repo_id: a .gguf
    file, a directory, "owner/name", "owner/name:Q4_K_M") with whatever HuggingFacePipeline takes;
    or, for a server, `llm=HuggingFaceEndpoint(...)`, or `backend="remote"` with whatever that
    takes. `backend="auto"`: here, if the model can run here, else at a server; `fallback="remote"`
    sends to it what cannot be loaded here (see `hfcore.placement`); otherwise no prompt ever leaves
    this process.

    Sampling: temperature (0 is greedy), top_k, top_p, min_p, typical_p, repetition_penalty,
    frequency_penalty, presence_penalty, logit_bias, seed, do_sample, max_tokens (max_new_tokens),
    min_tokens, stop (stop_sequences), stop_token_ids, ignore_eos, skip_special_tokens, logprobs,
    top_logprobs, n (answers to each conversation, for `generate`; they cannot be streamed).
    Log probabilities are of the distribution that was sampled from (after penalties, bias,
    temperature and grammar), before top_k, top_p, min_p and typical_p.

    What an answer looks like: `bind_tools` and `with_structured_output`, or response_format
    (OpenAI's dict, a JSON schema, a class), regex, choice (a list of str), grammar (Lark), one of
    them. `reasoning`: True asks for thoughts, False tells the template that there are to be none;
    they come in additional_kwargs["reasoning_content"] and as blocks of `content_blocks`.
    `tool_style` names how calls are written, where the model's own way is not recognised.

    For each option the call wins over what was bound, that over this object, that over `llm`, that
    over the model's own defaults.

    Others: `adapter`, the name or directory of a LoRA adapter that the request runs with;
    `timeout`, seconds for a whole request; `priority`, -100 to 100: who has the higher one
    runs first; `template_variables`, passed to the chat template; `parse_special_in_content`,
    whether a message that spells a control token makes one (not by itself); `streaming`, whether
    invoke goes through the stream; `stream_usage=False` leaves usage out of streams. `max_retries`
    and `api_key` are a server's: a model in this process accepts them for the sake of programs that
    pass them to every model.

    Of a server, options that chat completions have no field for raise (see `hfcore.remote`);
    `extra_body` adds fields to a request as they are. Messages may hold images, audio, video and
    files there. Grammars are the server's to enforce.

    The conversation may have any shape that the model's template allows. Where it refuses one,
    see `hfcore.backends`. Errors are hfcore's own (`hfcore.errors`).

    >>> import tempfile
    >>> from hfcore.testing import tiny_model
    >>> chat = ChatHuggingFace(model=tiny_model(tempfile.mkdtemp()), max_tokens=4, temperature=0)
    >>> message = chat.invoke("Hello")
    >>> message.usage_metadata["output_tokens"], message.response_metadata["finish_reason"]
    (4, 'length')
    """

    llm: TextModel
    model_id: str
    temperature: float | None = None
    max_tokens: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    do_sample: bool | None = None
    stop: list[str] | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    template_variables: dict[str, Any] | None = None
    parse_special_in_content: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    response_format: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning: bool | None = None
    tool_style: str | None = None
    timeout: float | None = None
    adapter: str | None = None
    priority: int | None = None
    streaming: bool = False
    stream_usage: bool = True
    max_retries: int | None = None
    api_key: SecretStr | None = None

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    _others: dict[str, Backend] = PrivateAttr(default_factory=dict)

    def __init__(self, **kwargs: Any) -> None:
        fields = type(self).model_fields
        given = options.canonical(kwargs, (*fields, *_FOR_LLM))
        for_llm = {name: given.pop(name) for name in _FOR_LLM if name in given}
        llm = _llm(given.pop("llm", None), for_llm, given.get("api_key"))
        with plain_errors():
            if given.get("response_format") is not None:
                given["response_format"] = to_response_format(given["response_format"])
            super().__init__(**given | {"llm": llm, "model_id": llm.backend.model_name})

    @classmethod
    def from_model_id(
        cls, model_id: str, task: str | None = None, backend: str = "local", **kwargs: Any
    ) -> ChatHuggingFace:
        """The same as the constructor with `model=`.

        `backend`: "local" (or "pipeline"), "remote" (or "endpoint"), "auto", "transformers".
        """
        return cls(model_id=model_id, task=task, backend=backend, **kwargs)

    # As LangChain sees the model ---------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "huggingface-chat-wrapper"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that an answer depends on: files, how they are opened, every option set.

        LangChain's cache key is made of it.
        """
        return {**self.llm.backend.identity(), **self._defaults()}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache's key: the model, and the whole request but for its messages."""
        request = self._request((), stop, kwargs)
        asked = {n: v for n, v in request.options.items() if n not in _NO_MATTER}
        key = [self._llm_type, request.backend.identity(), asked, request.tools]
        return json.dumps(key, sort_keys=True, default=str)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: `langchain_core.load` writes and reads this, by the name of its model."""
        return True

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """What is never written; `load` looks for it in the environment, if told to."""
        return {"api_key": "HF_TOKEN"}

    def _resolve_model_profile(self) -> ModelProfile | None:
        """What a chat model of hfcore can do; the context's size where it is known unopened."""
        if isinstance(self.llm.backend, Remote):
            return None  # no server says
        size = self.llm.backend.context_size
        profile: ModelProfile = {**_PROFILE}
        if isinstance(self.llm.backend, Transformers):  # nothing makes it follow a grammar
            profile |= {"tool_choice": False, "structured_output": False}
        return {**profile, "max_input_tokens": size} if size else profile

    def _get_invocation_params(
        self, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        params = super()._get_invocation_params(stop=stop, **kwargs)
        backend = self._backend(_model_named(kwargs))
        return params if backend is self.llm.backend else {**params, **backend.identity()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        call, bound = options.call_layers(kwargs, stop)
        wishes = {**self._defaults(), **_known(bound), **_known(call)}
        params: dict[str, Any] = {
            "ls_provider": PROVIDER,
            "ls_model_type": "chat",
            "ls_model_name": _model_named(kwargs) or self.llm.backend.model_name,
        }
        for name in ("temperature", "max_tokens", "stop"):
            if wishes.get(name):
                params[f"ls_{name}"] = wishes[name]
        if wishes.get("temperature") == 0:
            params["ls_temperature"] = 0.0
        return params

    def bind(self, **kwargs: Any) -> Any:
        """As in LangChain. A bound option gives way to a call's, by whichever name either goes."""
        return super().bind(**options.mark_bound(kwargs))

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools that it may call; calls come in the answer's `tool_calls`.

        Args:
            tools: functions, BaseTools, pydantic classes (1 or 2), TypedDicts, dataclasses, dicts
                (OpenAI's, Anthropic's, a JSON schema with a title).
            tool_choice: None or "auto": the model decides; "any", "required" or True: at least one
                call; "none" or False: none; a tool's name (or OpenAI's or Anthropic's dict of it):
                that one. It is enforced, not asked for.
            strict: arguments have no keys but those of the schema.
            parallel_tool_calls: whether one answer may hold several calls; None: it may.
            response_format: what an answer that is no call looks like.
            kwargs: options of the request.

        Raises InvalidRequestError for what is no tool and a choice that is none of them; for two
        tools of one name, when asked.

        >>> from hfcore.engine import ToolCall
        >>> from hfcore.testing import Canned
        >>> chat = ChatHuggingFace(model="owner/name")
        >>> chat.llm._backend = Canned([ToolCall(0, "c1", "add", '{"a": 1, "b": 2}')])
        >>> def add(a: int, b: int) -> int:
        ...     "Add two numbers."
        ...     return a + b
        >>> chat.bind_tools([add], tool_choice="add").invoke("1 + 2?").tool_calls[0]["args"]
        {'a': 1, 'b': 2}
        """
        schemas = to_tools(tools, strict)
        asked: dict[str, Any] = {
            "tool_choice": to_choice(tool_choice, schemas),
            "parallel_tool_calls": parallel_tool_calls,
        }
        if response_format is not None:
            asked["response_format"] = to_response_format(response_format, strict)
        given = {name: value for name, value in asked.items() if value is not None}
        bound: Runnable[LanguageModelInput, AIMessage] = self.bind(tools=schemas, **given, **kwargs)
        return bound

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """This model, followed by what reads its answer as an object of the schema.

        Args:
            schema: a pydantic class (1 or 2) or a dataclass gives instances; a TypedDict, a JSON
                schema or a function of OpenAI's gives dicts. May be None for "json_mode".
            method: "json_schema": the answer is bound to the schema; "function_calling": it is a
                call of a tool with that schema; "json_mode": it is some JSON object, and whether
                it fits is seen afterwards.
            include_raw: give {"raw": message, "parsed": object or None, "parsing_error": error or
                None} and raise nothing.
            strict: objects have no keys but those of the schema.
            tools: with "json_schema", tools that may be called before; a call gives None.
            kwargs: options of the request.

        A stream gives objects as they grow. Raises OutputParserException when an answer is no such
        object (it was cut, or fails a validator that a schema cannot express).

        >>> from hfcore.testing import Canned
        >>> chat = ChatHuggingFace(model="owner/name")
        >>> chat.llm._backend = Canned('{"city": "Oslo"}')
        >>> schema = {"title": "Place", "type": "object", "properties": {"city": {}}}
        >>> chat.with_structured_output(schema).invoke("Where is the fjord?")
        {'city': 'Oslo'}
        """
        if method not in METHODS:
            raise InvalidRequestError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if tools and method != "json_schema":
            raise InvalidRequestError(f"tools go with method='json_schema' only, got {method!r}")
        options.canonical(kwargs, (*self.llm.chat_known, "model"))
        asked, tool = _structured(schema, method, strict)
        if tools:
            asked["tools"] = to_tools(tools, strict)
        model = self.bind(**asked, **kwargs)
        reader = Reader(schema, tool)
        after: Runnable[Any, Any] = with_raw(reader) if include_raw else Parser(reader=reader)
        chain: Runnable[LanguageModelInput, Any] = model | after
        return chain

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own tokens of a text, without special ones around it."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.llm.backend.token_ids(text)

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """The tokens of a conversation as the chat template writes it, tools included."""
        return self.llm.backend.count_tokens(to_dicts(messages), to_tools(tools))

    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
        check_calls(model_input)
        try:
            return super()._convert_input(model_input)
        except HfcoreError:
            raise
        except (ValueError, TypeError, NotImplementedError, KeyError) as error:
            raise InvalidRequestError(f"not a conversation: {error!s:.300}") from error

    # One request -------------------------------------------------------------------------------

    def _backend(self, model: str | None) -> Backend:
        """Where answers come from; another model, if a call names one, opened the same way."""
        if model is None or model == self.llm.backend.model_name:
            return self.llm.backend
        if model not in self._others:
            self._others[model] = self.llm.backend.sibling(model)
        return self._others[model]

    def _defaults(self) -> dict[str, Any]:
        """What this object and its llm ask of every request."""
        known = self.llm.chat_known
        mine = {n: getattr(self, n) for n in known if n in type(self).model_fields}
        return options.merge(mine, _of_chats(self.llm.asked, known), known=known)

    def _request(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> _Request:
        call, bound = options.call_layers(kwargs, stop)
        usage = _first_set("stream_usage", call, bound, default=self.stream_usage)
        layers = [
            {n: v for n, v in layer.items() if n not in (*_IGNORED_IN_CALLS, "stream_usage")}
            for layer in (call, bound)
        ]
        known = (*self.llm.chat_known, "model", "tools")
        wishes = options.merge(*layers, self._defaults(), known=known)
        if "stream_usage" in known:
            wishes["stream_usage"] = bool(usage)
        backend = self._backend(wishes.pop("model", None))
        schemas = to_tools(wishes.pop("tools", None))
        check_names(schemas)
        if "tool_choice" in wishes:
            wishes["tool_choice"] = to_choice(wishes["tool_choice"], schemas)
        if "response_format" in wishes:
            wishes["response_format"] = to_response_format(wishes["response_format"])
        blocks = self.output_version == "v1"
        return _Request(backend, messages, schemas or None, wishes, bool(usage), blocks)

    @override
    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        """The counts of all conversations of one `generate` together."""
        counts: Counter[str] = Counter()
        for output in llm_outputs:  # None: from a cache
            counts.update((output or {}).get("token_usage", {}))
        return {"token_usage": dict(counts), "model_name": self.llm.backend.model_name}

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs).at_once(self.streaming)
        with contextlib.closing(request.stream()) as deltas:
            return _result(totals(deltas), request.backend.model_name)

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs).at_once(self.streaming)
        async with contextlib.aclosing(request.astream()) as deltas:
            done = totals([delta async for delta in deltas])
        return _result(done, request.backend.model_name)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        request = self._request(messages, stop, kwargs).single()
        with contextlib.closing(request.stream()) as deltas:
            for chunk in (chunk for delta in deltas for chunk in request.chunks(delta)):
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        request = self._request(messages, stop, kwargs).single()
        async with contextlib.aclosing(request.astream()) as deltas:
            async for delta in deltas:
                for chunk in request.chunks(delta):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk


@dataclass(frozen=True)
class _Request:
    """One request, ready for its backend, and how its deltas become LangChain's chunks."""

    backend: Backend
    messages: Sequence[BaseMessage]
    tools: list[dict[str, Any]] | None
    options: dict[str, Any]
    usage: bool
    blocks: bool

    def stream(self) -> Deltas:
        """Submit it."""
        return self.backend.stream(self._dicts(), self.tools, self.options)

    def astream(self) -> AsyncGenerator[Delta, None]:
        """The same for an event loop."""
        return self.backend.astream(self._dicts(), self.tools, self.options)

    def _dicts(self) -> list[dict[str, Any]]:
        return to_dicts(self.messages, parts=self.backend.takes_parts)

    def at_once(self, streaming: bool) -> _Request:
        """Itself, with a whole answer of a server rather than a stream that nobody watches."""
        if streaming or not isinstance(self.backend, Remote):
            return self
        return replace(self, options={**self.options, WHOLE: True})

    def single(self) -> _Request:
        """Itself, if a stream can be made of it."""
        check_single(self.options)
        return self

    def chunks(self, delta: Delta) -> Iterator[ChatGenerationChunk]:
        """A delta as chunks: none for one that says nothing (text held back), one for most.

        Pieces of calls stand alone: LangChain's content blocks take a chunk for one or the other.
        """
        ended = delta.finish_reason is not None
        calls = [
            tool_call_chunk(name=c.name, args=c.arguments, id=c.id, index=c.index)
            for c in delta.tool_calls
        ]
        if calls and (delta.text or delta.reasoning):
            yield self._chunk(replace(delta, tool_calls=(), finish_reason=None, usage=None), [])
            delta = replace(delta, text="", reasoning="", logprobs=None)
        if calls:
            yield self._chunk(replace(delta, finish_reason=None, usage=None), calls)
            delta = replace(delta, logprobs=None)
        if ended or (not calls and (delta.text or delta.reasoning or delta.logprobs)):
            yield self._chunk(delta, [])

    def _chunk(self, delta: Delta, calls: list[ToolCallChunk]) -> ChatGenerationChunk:
        last = delta.finish_reason is not None
        metadata = _metadata(delta, self.backend.model_name) if last else _logprobs(delta)
        # In content blocks core would number a call like the text before it, and merge the two.
        blocks: list[str | dict[Any, Any]] = [
            {**call, "index": f"lc_call_{call['index']}"} for call in calls if self.blocks
        ]
        message = AIMessageChunk(
            content=blocks or delta.text,
            additional_kwargs=_thoughts(delta),
            tool_call_chunks=calls,
            response_metadata=metadata | ({"output_version": "v1"} if blocks else {}),
            usage_metadata=_usage(delta) if self.usage else None,
            chunk_position="last" if last else None,
        )
        info = {"finish_reason": delta.finish_reason} if last else None
        return ChatGenerationChunk(message=message, generation_info=info)


_CHAT = options.CHAT_REQUEST
_PROFILE: ModelProfile = {
    "text_inputs": True, "image_inputs": False, "audio_inputs": False, "video_inputs": False,
    "pdf_inputs": False, "text_outputs": True, "tool_calling": True, "tool_choice": True,
    "tool_call_streaming": True, "structured_output": True, "temperature": True,
}  # fmt: skip


def _structured(schema: Any, method: str, strict: bool | None) -> tuple[dict[str, Any], str | None]:
    """What `with_structured_output` binds, and the name of the tool that carries the answer."""
    if schema is None and method != "json_mode":
        raise InvalidRequestError(f"method={method!r} needs a schema, got None")
    noted = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    asked: dict[str, Any] = {} if schema is None else {"ls_structured_output_format": noted}
    if method == "json_mode":
        if strict is not None:
            raise InvalidRequestError(f"json_mode knows no schema to be strict about, got {strict}")
        return {**asked, "response_format": {"type": "json_object"}}, None
    known = to_schema(schema)
    if method == "json_schema":
        return {**asked, "response_format": known.format(strict)}, None
    if known.schema.get("type", "object") != "object":
        raise InvalidRequestError(
            f"arguments are objects, but the schema's type is {known.schema['type']!r};"
            " use method='json_schema'"
        )
    [tool] = to_tools([known.tool()], strict)
    choice = to_choice(known.name, [tool])
    return {
        **asked,
        "tools": [tool],
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }, known.name


def _result(answers: list[Completion], model_name: str) -> ChatResult:
    counts = token_usage(answers)
    return ChatResult(
        generations=[_generation(done, model_name) for done in answers],
        llm_output={**({"token_usage": counts} if counts else {}), "model_name": model_name},
    )


def _generation(done: Completion, model_name: str) -> ChatGeneration:
    valid, invalid = from_calls(done.tool_calls)
    message = AIMessage(
        content=done.text,
        additional_kwargs=_thoughts(done),
        tool_calls=valid,
        invalid_tool_calls=invalid,
        response_metadata=_metadata(done, model_name),
        usage_metadata=_usage(done),
    )
    return ChatGeneration(message=message, generation_info={"finish_reason": done.finish_reason})


def _thoughts(source: Delta | Completion) -> dict[str, Any]:
    return {"reasoning_content": source.reasoning} if source.reasoning else {}


def _metadata(ended: Delta | Completion, model_name: str) -> dict[str, Any]:
    return {
        "model_name": model_name,
        "model_provider": PROVIDER,
        "finish_reason": ended.finish_reason,
        **(ended.about or {}),
        **_logprobs(ended),
    }


def _logprobs(source: Delta | Completion) -> dict[str, Any]:
    return {} if source.logprobs is None else {"logprobs": logprobs_dict(source.logprobs)}


def _usage(source: Delta | Completion) -> UsageMetadata | None:
    if source.usage is None:
        return None
    counts = UsageMetadata(
        input_tokens=source.usage.prompt_tokens,
        output_tokens=source.usage.completion_tokens,
        total_tokens=source.usage.total_tokens,
    )
    if source.usage.reasoning_tokens is not None:
        details = OutputTokenDetails(reasoning=source.usage.reasoning_tokens)
        counts["output_token_details"] = details
    return counts


def _llm(llm: Any, for_llm: dict[str, Any], api_key: Any) -> TextModel:
    """The llm given, or one made of the arguments that are meant for it."""
    key = SecretStr(api_key) if isinstance(api_key, str) else api_key
    if llm is None:
        return _speaking(_made(for_llm, key))
    if not isinstance(llm, HuggingFacePipeline | HuggingFaceEndpoint):
        raise InvalidRequestError(
            "llm must be a HuggingFacePipeline or a HuggingFaceEndpoint of hfcore,"
            f" got {type(llm).__name__}"
        )
    extra = {n: v for n, v in for_llm.items() if v not in ({}, []) and (n, v) != ("task", llm.task)}
    name = llm.backend.model_name
    if str(extra.get("model", name)) != name:
        raise InvalidRequestError(
            f"model={extra['model']!r} differs from that of llm, {name!r}; give one of them"
        )
    extra.pop("model", None)
    if extra:
        raise InvalidRequestError(f"{next(iter(extra))} belongs to llm; give it there")
    if isinstance(llm, HuggingFaceEndpoint) and key is not None:
        llm = llm.with_token(key)
    return _speaking(llm)


def _made(given: dict[str, Any], key: SecretStr | None) -> TextModel:
    """A model here or at a server, as `backend` and `fallback` say."""
    backend = given.pop("backend", "default")
    away = {name: given.pop(name) for name in _FOR_ENDPOINT if name in given}
    if backend in _REMOTE:
        return _endpoint(given | away, key)
    elsewhere = backend == "auto" or given.get("fallback") is not None
    if away and not elsewhere:
        raise InvalidRequestError(
            f"{next(iter(away))} is for a server: give backend='remote' or 'auto',"
            " or fallback='remote'"
        )
    if away and isinstance(given.get("fallback"), TextModel):
        raise InvalidRequestError(f"{next(iter(away))} belongs to fallback; give it there")
    if away:
        place = {"model": server_name(str(given.get("model", "")))} | away
        token = given.get("token", key)
        if token is not None and may_see_token(away.get("endpoint_url")):
            place["token"] = token
        given["fallback"] = HuggingFaceEndpoint(**place)
    elif elsewhere and key is not None:
        given.setdefault("token", key)
    return HuggingFacePipeline(backend=backend, **given)


def _endpoint(given: dict[str, Any], key: SecretStr | None) -> HuggingFaceEndpoint:
    """A model at a server of arguments that may be meant for both kinds."""
    for name in given:
        if name not in (*_FOR_ENDPOINT, *_FOR_BOTH):
            raise InvalidRequestError(f"{name} is for a model in this process, not for a server")
    if key is not None:
        given = {"token": key} | given
    return HuggingFaceEndpoint(**given)


def _speaking(llm: TextModel) -> TextModel:
    """Refuse what makes sense for text only: an answer that begins with the prompt."""
    asked = llm.asked
    if asked.get("return_full_text") or asked.get("skip_prompt") is False:
        raise InvalidRequestError(
            "return_full_text=True is for text prompts; a chat's answer is the answer alone"
        )
    return llm


def _of_chats(asked: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """What an llm asks of texts, less what a chat with it has no use for."""
    return {n: v for n, v in asked.items() if n in known or n not in _OF_TEXTS}


def _model_named(kwargs: Mapping[str, Any]) -> str | None:
    """The model that a call asks for instead of this object's own."""
    names = ("model", *(a for a, option in options.ALIASES.items() if option == "model"))
    return next((str(kwargs[n]) for n in names if kwargs.get(n) is not None), None)


def _known(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's options, anything else left out: tracing must not fail before the request does."""
    named = {options.ALIASES.get(n, n): v for n, v in layer.items() if v is not None}
    return {n: v for n, v in named.items() if n in _CHAT}


def _first_set(name: str, *layers: Mapping[str, Any], default: Any) -> Any:
    return next((layer[name] for layer in layers if layer.get(name) is not None), default)


revivable(ChatHuggingFace)
