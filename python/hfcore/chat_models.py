"""ChatHuggingFace: LangChain's chat interface to a model in this process.

Tools and structured output are not here yet: asking for them is an error, never ignored.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import PromptValue
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, PrivateAttr, SecretStr
from typing_extensions import override

from . import options
from .backends import Backend
from .engine import Completion, Delta, total
from .errors import HfcoreError, InvalidRequestError
from .llms import ECHO, HuggingFacePipeline, logprobs_dict, plain_errors, usage_dict
from .messages import to_dicts

PROVIDER = "huggingface"
_FOR_LLM = (
    "model", "model_kwargs", "pipeline_kwargs", "batch_size", "device_map", "task", "pipeline",
    *options.MODEL,
)  # fmt: skip
_IGNORED_IN_CALLS = ("stream", "streaming")


class ChatHuggingFace(BaseChatModel):
    """A Hugging Face chat model, run in this process.

    Give it either `llm=HuggingFacePipeline(...)`, or `model=` (also model_id, repo_id: a .gguf
    file, a directory, "owner/name", "owner/name:Q4_K_M") with whatever HuggingFacePipeline takes.

    Sampling: temperature (0 is greedy), top_k, top_p, min_p, typical_p, repetition_penalty,
    frequency_penalty, presence_penalty, logit_bias, seed, do_sample, max_tokens (max_new_tokens),
    min_tokens, stop (stop_sequences), stop_token_ids, ignore_eos, skip_special_tokens, logprobs,
    top_logprobs. For each, the call wins over what
    was bound, that over this object, that over `llm`, that over the model's own defaults.

    Others: `timeout`, seconds for a whole request; `template_variables`, passed to the chat
    template; `streaming`, whether invoke goes through the stream; `stream_usage=False` leaves
    usage out of streams. `max_retries` and `api_key` are accepted for the sake of programs that
    pass them to every model: there is no server to try again or to log in to.

    The conversation may have any shape that the model's template allows. Where it refuses one,
    see `hfcore.backends`. Errors are hfcore's own (`hfcore.errors`).

    >>> import tempfile
    >>> from hfcore.testing import tiny_model
    >>> chat = ChatHuggingFace(model=tiny_model(tempfile.mkdtemp()), max_tokens=4, temperature=0)
    >>> message = chat.invoke("Hello")
    >>> message.usage_metadata["output_tokens"], message.response_metadata["finish_reason"]
    (4, 'length')
    """

    llm: HuggingFacePipeline
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
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    timeout: float | None = None
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
        llm = _llm(given.pop("llm", None), for_llm)
        with plain_errors():
            super().__init__(**given | {"llm": llm, "model_id": llm.model_id})

    @classmethod
    def from_model_id(
        cls, model_id: str, task: str | None = None, backend: str = "pipeline", **kwargs: Any
    ) -> ChatHuggingFace:
        """The same as the constructor with `model=`. `backend`: "pipeline", the only one yet."""
        if backend != "pipeline":
            raise InvalidRequestError(
                f"backend must be 'pipeline', got {backend!r}; endpoints are not supported yet"
            )
        return cls(model_id=model_id, task=task, **kwargs)

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
        schemas = [convert_to_openai_tool(tool) for tool in tools or ()]
        return self.llm.backend.count_tokens(to_dicts(messages), schemas)

    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
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
        mine = {n: getattr(self, n) for n in options.CHAT_REQUEST if n in type(self).model_fields}
        return options.merge(mine, _without_echo(self.llm.pipeline_kwargs), known=_CHAT)

    def _request(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> _Request:
        call, bound = options.call_layers(kwargs, stop)
        usage = _first_set("stream_usage", call, bound, default=self.stream_usage)
        layers = [
            {n: v for n, v in layer.items() if n not in (*_IGNORED_IN_CALLS, "stream_usage")}
            for layer in (call, bound)
        ]
        wishes = options.merge(*layers, self._defaults(), known=(*_CHAT, "model"))
        backend = self._backend(wishes.pop("model", None))
        return _Request(backend, to_dicts(messages), wishes, bool(usage))

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs)
        stream = request.backend.stream(request.prompt, None, request.options)
        with contextlib.closing(stream) as deltas:
            return _result(total(list(deltas)), request.backend.model_name)

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs)
        stream = request.backend.astream(request.prompt, None, request.options)
        async with contextlib.aclosing(stream) as deltas:
            done = total([delta async for delta in deltas])
        return _result(done, request.backend.model_name)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        request = self._request(messages, stop, kwargs)
        stream = request.backend.stream(request.prompt, None, request.options)
        with contextlib.closing(stream) as deltas:
            for chunk in filter(None, map(request.chunk, deltas)):
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
        request = self._request(messages, stop, kwargs)
        stream = request.backend.astream(request.prompt, None, request.options)
        async with contextlib.aclosing(stream) as deltas:
            async for delta in deltas:
                chunk = request.chunk(delta)
                if chunk is None:
                    continue
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk


@dataclass(frozen=True)
class _Request:
    """One request, ready for its backend, and how its deltas become LangChain's chunks."""

    backend: Backend
    prompt: list[dict[str, Any]]
    options: dict[str, Any]
    usage: bool

    def chunk(self, delta: Delta) -> ChatGenerationChunk | None:
        """A delta as a chunk; None for one that says nothing (text held back)."""
        last = delta.finish_reason is not None
        if not (delta.text or delta.logprobs or last):
            return None
        metadata = _metadata(delta, self.backend.model_name) if last else _logprobs(delta)
        message = AIMessageChunk(
            content=delta.text,
            response_metadata=metadata,
            usage_metadata=_usage(delta) if self.usage else None,
            chunk_position="last" if last else None,
        )
        info = {"finish_reason": delta.finish_reason} if last else None
        return ChatGenerationChunk(message=message, generation_info=info)


_CHAT = options.CHAT_REQUEST


def _result(done: Completion, model_name: str) -> ChatResult:
    message = AIMessage(
        content=done.text,
        response_metadata=_metadata(done, model_name),
        usage_metadata=_usage(done),
    )
    info = {"finish_reason": done.finish_reason}
    counts = {"token_usage": usage_dict(done.usage)} if done.usage else {}
    return ChatResult(
        generations=[ChatGeneration(message=message, generation_info=info)],
        llm_output={**counts, "model_name": model_name},
    )


def _metadata(ended: Delta | Completion, model_name: str) -> dict[str, Any]:
    return {
        "model_name": model_name,
        "model_provider": PROVIDER,
        "finish_reason": ended.finish_reason,
        **_logprobs(ended),
    }


def _logprobs(source: Delta | Completion) -> dict[str, Any]:
    return {} if source.logprobs is None else {"logprobs": logprobs_dict(source.logprobs)}


def _usage(source: Delta | Completion) -> UsageMetadata | None:
    if source.usage is None:
        return None
    return UsageMetadata(
        input_tokens=source.usage.prompt_tokens,
        output_tokens=source.usage.completion_tokens,
        total_tokens=source.usage.total_tokens,
    )


def _llm(llm: Any, for_llm: dict[str, Any]) -> HuggingFacePipeline:
    """The llm given, or one made of the arguments that are meant for it."""
    if llm is None:
        return _speaking(HuggingFacePipeline(**for_llm))
    if not isinstance(llm, HuggingFacePipeline):
        raise InvalidRequestError(
            f"llm must be a HuggingFacePipeline of hfcore, got {type(llm).__name__}"
        )
    extra = {n: v for n, v in for_llm.items() if v not in ({}, []) and (n, v) != ("task", llm.task)}
    if str(extra.get("model", llm.model_id)) != llm.model_id:
        raise InvalidRequestError(
            f"model={extra['model']!r} differs from that of llm, {llm.model_id!r}; give one of them"
        )
    extra.pop("model", None)
    if extra:
        raise InvalidRequestError(f"{next(iter(extra))} belongs to llm; give it there")
    return _speaking(llm)


def _speaking(llm: HuggingFacePipeline) -> HuggingFacePipeline:
    """Refuse what makes sense for text only: an answer that begins with the prompt."""
    asked = llm.pipeline_kwargs
    if asked.get("return_full_text") or asked.get("skip_prompt") is False:
        raise InvalidRequestError(
            "return_full_text=True is for text prompts; a chat's answer is the answer alone"
        )
    return llm


def _without_echo(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in asked.items() if n not in (*ECHO, "add_special_tokens")}


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
