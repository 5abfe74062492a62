"""HuggingFaceEndpoint: LangChain's text-completion interface to a model behind a server.

Its arguments are those of langchain-huggingface. What they become on the wire is `remote`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.outputs import LLMResult
from pydantic import Field, PrivateAttr, SecretStr
from typing_extensions import Self, override

from . import connection, options
from .engine import Completion, Delta
from .errors import InvalidRequestError
from .llms import ECHO, Call, TextModel, plain_errors, revivable, totals
from .remote import WHOLE, Remote
from .tools import to_response_format
from .urls import TOKEN_VARIABLES, open_headers

_PLACE = ("endpoint_url", "repo_id", "model", "inference_server_url")
_NAMES = {
    "model_id": "model",
    "model_name": "model",
    "base_url": "endpoint_url",
    "api_key": "token",
}
_FIELD_OF = {"max_tokens": "max_new_tokens", "stop": "stop_sequences"}
_SERVER = (
    "token", "provider", "task", "headers", "bill_to", "timeout", "max_retries", "server_kwargs",
    "client", "async_client", "model_kwargs", "streaming", "batch_size",
)  # fmt: skip
_KNOWN = (*options.TEXT_REQUEST, *ECHO, *options.REMOTE, "streaming")
_NO_FIELDS = ("timeout", "max_retries")
"""Options of a request whose names mean something else in the constructor, or nothing at all."""


class HuggingFaceEndpoint(TextModel):
    """A Hugging Face model behind a server, that continues a text.

    For chats, give it to ChatHuggingFace.

    Where it is, one of:
        endpoint_url (or base_url, inference_server_url): TGI, vLLM, llama.cpp, SGLang, an Inference
            Endpoint or whatever else speaks OpenAI's API; `model` beside it is the name there.
        repo_id (or model): "owner/name" at Hugging Face, by `provider`, or the one that the hub
            chooses. Needs a token.
        client, async_client: an InferenceClient, an AsyncInferenceClient of yours; they are used
            as they are.

    How it is asked:
        huggingfacehub_api_token (or api_key): sent wherever the endpoint is. Without it, that of
            HUGGINGFACEHUB_API_TOKEN, of HF_TOKEN or of the saved login, which Hugging Face's own
            hosts alone may see.
        timeout: seconds that the server may be silent, default 120; an answer that does not stream
            is silence until it is there. As an option of a call it is the time for the whole
            request.
        max_retries: attempts after the first one, default 2: after 429 (when Retry-After says, if
            that is within a minute), 5xx and lost connections, as long as nothing of the answer
            has been handed on.
        headers, bill_to, server_kwargs (cookies).
        task: "text-generation" or "conversational"; None: a text goes to text generation, or to
            a chat where the server has that alone.
        batch_size: how many prompts of one `generate` or `batch` are under way at a time.
        streaming: `invoke` streams from the server too, and tells callbacks of every token.

    What is asked: max_new_tokens, temperature (0 is greedy), top_k, top_p, typical_p, min_p,
    repetition_penalty, frequency_penalty, presence_penalty, logit_bias, seed, do_sample,
    stop_sequences, logprobs, top_logprobs, n, min_tokens, ignore_eos, stop_token_ids,
    skip_special_tokens, add_special_tokens, response_format, regex, choice, grammar, adapter,
    truncate, watermark; return_full_text: whether the answer begins with the prompt. What is not
    given is the server's to choose. What the kind of request has no field for raises
    InvalidRequestError. `model_kwargs`: more of them; names unknown here go into the request's
    JSON as they are.

    Errors are `hfcore.errors.RemoteError`s.

    >>> from hfcore.testing import serving
    >>> with serving("Hello there") as url:
    ...     llm = HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=5)
    ...     llm.invoke("Say hello")
    'Hello there'
    """

    endpoint_url: str | None = None
    repo_id: str | None = None
    model: str | None = None
    inference_server_url: str | None = None
    provider: str | None = None
    huggingfacehub_api_token: SecretStr | None = None
    task: str | None = None
    headers: dict[str, str] | None = Field(default=None, repr=False, exclude=True)
    bill_to: str | None = None
    timeout: float = connection.SILENCE
    max_retries: int = Field(default=2, ge=0)
    server_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False, exclude=True)
    client: Any = Field(default=None, repr=False, exclude=True)
    async_client: Any = Field(default=None, repr=False, exclude=True)
    batch_size: int = Field(default=8, ge=1)
    streaming: bool = False

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    do_sample: bool | None = None
    stop_sequences: list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    response_format: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    adapter: str | None = None
    truncate: int | None = None
    watermark: bool | None = None
    return_full_text: bool | None = None
    stream_usage: bool | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)

    _asked: dict[str, Any] | None = PrivateAttr(default=None)

    known: ClassVar[tuple[str, ...]] = _KNOWN
    chat_known: ClassVar[tuple[str, ...]] = (
        *options.CHAT_REQUEST, *options.REMOTE, "add_special_tokens",
    )  # fmt: skip

    def __init__(self, **kwargs: Any) -> None:
        given = _named(kwargs)
        token = given.pop("token", None)
        if token is not None and not isinstance(token, SecretStr):
            token = SecretStr(connection.checked_token(token))
        _check_more(given.get("model_kwargs"))
        with plain_errors():
            super().__init__(**given | {"huggingfacehub_api_token": token})
        place = connection.make(
            endpoint_url=_url(self.endpoint_url, self.inference_server_url),
            repo_id=self.repo_id,
            model=self.model,
            provider=self.provider,
            token=token,
            headers=self.headers,
            bill_to=self.bill_to,
            timeout=self.timeout,
            max_retries=self.max_retries,
            server_kwargs=self.server_kwargs,
            client=self.client,
            async_client=self.async_client,
        )
        self._backend = Remote(place, self.task)
        _ = self.asked  # what contradicts itself is refused at once

    @property
    def model_id(self) -> str:
        """The model as its user calls it: its name, else where it is."""
        return self._backend.model_name

    @property
    def asked(self) -> dict[str, Any]:
        """See TextModel."""
        if self._asked is not None:
            return self._asked
        fields = {
            name: getattr(self, _FIELD_OF.get(name, name))
            for name in (*_KNOWN, "skip_prompt")
            if name not in _NO_FIELDS and _FIELD_OF.get(name, name) in type(self).model_fields
        }
        ours, extra = _split(self.model_kwargs)
        asked = options.combine(fields, ours, known=_KNOWN)
        if extra:
            asked["extra_body"] = {**extra, **asked.get("extra_body", {})}
        return asked

    def asking(self, asked: dict[str, Any]) -> Self:
        """See TextModel."""
        copy = self.model_copy()
        copy._asked = asked
        return copy

    def with_token(self, token: SecretStr) -> Self:
        """This model, with that token, unless it has one."""
        if self.huggingfacehub_api_token is not None or not isinstance(self._backend, Remote):
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | {"huggingfacehub_api_token": token})

    @property
    def _llm_type(self) -> str:
        return "huggingface_endpoint"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All that an answer depends on, so that caches never mix two models up."""
        return {**self._backend.identity(), **self.asked}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: `langchain_core.load` writes and reads this, without tokens and secret headers."""
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        """What is never written; `load` looks for it in the environment, if told to."""
        return {"huggingfacehub_api_token": TOKEN_VARIABLES[0]}

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The headers that are no secret."""
        plain = open_headers(self.headers or {})
        return {"headers": plain} if plain else {}

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        plain = open_headers(self.headers or {}) or None
        hidden = {"huggingfacehub_api_token": None, "headers": plain, "server_kwargs": {}}
        return {**state, "__dict__": {**state["__dict__"], **hidden}}

    @override
    def _at_once(self, call: Call) -> Call:
        if call.streaming:
            return call
        return replace(call, options={**call.options, WHOLE: True})

    @override
    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = self._at_once(self._call(stop, kwargs))

        def told(delta: Delta) -> Delta:
            if call.streaming and run_manager and delta.text:
                run_manager.on_llm_new_token(delta.text, chunk=self._chunk(delta))
            return delta

        def complete(prompt: str) -> list[Completion]:
            deltas = self._backend.stream(prompt, None, call.options)
            with contextlib.closing(deltas):
                return totals(told(delta) for delta in deltas)

        if len(prompts) == 1:
            return self._result(prompts, [complete(prompts[0])], call)
        with ThreadPoolExecutor(max(1, min(self.batch_size, len(prompts)))) as pool:
            try:
                completions = list(pool.map(complete, prompts))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._result(prompts, completions, call)


def _named(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments by the names of fields."""
    kwargs = {_NAMES.get(name, name): value for name, value in kwargs.items() if value is not None}
    own = ("custom_get_token_ids", "name", "cache", "verbose", "callbacks", "tags", "metadata")
    place = {name: value for name, value in kwargs.items() if name in (*_PLACE, *own)}
    rest = {name: value for name, value in kwargs.items() if name not in place}
    named = options.canonical(rest, (*_SERVER, *(n for n in _KNOWN if n not in ("priority",))))
    if "skip_prompt" in named:
        full = not named.pop("skip_prompt")
        if named.setdefault("return_full_text", full) is not full:
            raise InvalidRequestError("return_full_text and skip_prompt contradict")
    if "extra_body" in named:
        more = named.pop("extra_body")
        named["model_kwargs"] = {**named.get("model_kwargs", {}), "extra_body": more}
    if named.get("response_format") is not None:
        named["response_format"] = to_response_format(named["response_format"])
    return place | {_FIELD_OF.get(name, name): value for name, value in named.items()}


def _check_more(more: Any) -> None:
    if more is not None and not isinstance(more, Mapping):
        raise InvalidRequestError(f"model_kwargs must be a dict, got {type(more).__name__}")


def _split(more: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of model_kwargs what is an option, and what goes into the request as it is."""
    known = {n: v for n, v in more.items() if options.ALIASES.get(n, n) in _KNOWN}
    return known, {name: value for name, value in more.items() if name not in known}


def _url(endpoint_url: str | None, inference_server_url: str | None) -> str | None:
    if endpoint_url and inference_server_url and endpoint_url != inference_server_url:
        raise InvalidRequestError("endpoint_url and inference_server_url differ; give one of them")
    return endpoint_url or inference_server_url


revivable(HuggingFaceEndpoint)
