"""HuggingFacePipeline: LangChain's text-completion interface to a model in this process.

`TextModel` is what it shares with HuggingFaceEndpoint.

Constructor and `from_model_id` are those of langchain-huggingface; there is no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.llms import BaseLLM
from langchain_core.load.serializable import Serializable
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationError
from typing_extensions import Self, override

from . import hub, options
from .backends import Backend, Local
from .connection import make
from .engine import Completion, Delta, TokenLogprob, Usage, shared_engine, total
from .errors import InvalidRequestError
from .placement import Placed, server_name
from .remote import Remote
from .tools import to_response_format
from .transformers_backend import OF_FILES, Transformers

# By its full name: the package shows a function of this name instead of the module.
load = sys.modules["langchain_core.load.load"]

TASKS = ("text-generation",)
BACKENDS = ("default", "transformers", "auto")
_HERE = ("local", "pipeline")
"""Other names of the first of them."""
ECHO = ("return_full_text", "skip_prompt")
_KNOWN = (*options.TEXT_REQUEST, *ECHO)
_OF_RUNS = ("tags", "metadata", "run_name", "run_id")
"""What LangChain says of a call that is no option of the request."""


class TextModel(BaseLLM):
    """What HuggingFacePipeline and HuggingFaceEndpoint share: a backend, asked for texts."""

    batch_size: int = Field(default=4, ge=1)

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    _backend: Backend = PrivateAttr()

    known: ClassVar[tuple[str, ...]] = _KNOWN
    """The options that a call may have."""

    chat_known: ClassVar[tuple[str, ...]] = options.CHAT_REQUEST
    """Those that a chat with this model may have."""

    @property
    def asked(self) -> dict[str, Any]:
        """What this object asks of every request, under the names of `hfcore.options`."""
        raise NotImplementedError

    def asking(self, asked: dict[str, Any]) -> Self:
        """This model, asking that of every request."""
        raise NotImplementedError

    @property
    def backend(self) -> Backend:
        """Where the completions come from."""
        return self._backend

    def bind(self, **kwargs: Any) -> Runnable[Any, str]:
        """As in LangChain. A bound option gives way to a call's, by whichever name either goes."""
        return super().bind(**options.mark_bound(kwargs))

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own tokens of a text, without special ones around it."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._backend.token_ids(text)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        params = super()._get_ls_params(stop=stop, **kwargs)
        wishes = self._call(stop, kwargs).options
        params |= {"ls_provider": "huggingface", "ls_model_name": self._backend.model_name}
        for name in ("temperature", "max_tokens"):
            if name in wishes:
                params[f"ls_{name}"] = wishes[name]  # type: ignore[literal-required]
        return params

    def _call(self, stop: list[str] | None, kwargs: Mapping[str, Any]) -> Call:
        call, bound = options.call_layers(kwargs, stop)
        layers = (self._flat(call), self._flat(bound), self.asked)
        echo = next((e for e in map(_echo, layers) if e is not None), False)
        wishes = options.merge(*layers, known=self.known)
        if "response_format" in wishes:
            wishes["response_format"] = to_response_format(wishes["response_format"])
        streaming = bool(wishes.pop("streaming", False))
        return Call({n: v for n, v in wishes.items() if n not in ECHO}, echo, streaming)

    def _at_once(self, call: Call) -> Call:
        """A call whose answer nobody watches as it grows."""
        return call

    def _flat(self, layer: dict[str, Any]) -> dict[str, Any]:
        """A call's options, those that it nests under pipeline_kwargs included."""
        nested = layer.pop("pipeline_kwargs", None) or {}
        return options.combine(layer, nested, known=self.known)

    def _with(self, stop: list[str] | None, kwargs: Mapping[str, Any]) -> Self:
        """This model with a call's options as its own.

        The key of LangChain's cache is made of the model and `stop`: other options of a call are
        not in it, and two calls that differ in them would share an answer.
        """
        if stop is None and not kwargs:
            return self
        call = self._call(stop, kwargs)
        told = {"streaming": True} if call.streaming else {}
        return self.asking({**call.options, "return_full_text": call.echo, **told})

    @override
    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As in LangChain; options that nobody knows are refused here, before any callback."""
        run = {name: kwargs.pop(name) for name in _OF_RUNS if name in kwargs}
        model = self._with(stop, kwargs)
        return super(TextModel, model).generate(prompts, model.asked.get("stop"), callbacks, **run)

    @override
    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As `generate`."""
        run = {name: kwargs.pop(name) for name in _OF_RUNS if name in kwargs}
        model = self._with(stop, kwargs)
        return await super(TextModel, model).agenerate(
            prompts, model.asked.get("stop"), callbacks, **run
        )

    @override
    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = self._call(stop, kwargs)
        running: deque[Any] = deque()
        waiting = iter(prompts)
        completions: list[list[Completion]] = []

        def submit(count: int) -> None:
            for prompt in islice(waiting, count):
                running.append(self._backend.stream(prompt, None, call.options))

        try:
            submit(self.batch_size)
            while running:
                completions.append(totals(running[0]))
                running.popleft()
                submit(1)
        finally:
            for stream in running:
                stream.close()
        return self._result(prompts, completions, call)

    @override
    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = self._at_once(self._call(stop, kwargs))
        turn = asyncio.Semaphore(self.batch_size)

        async def told(delta: Delta) -> Delta:
            if call.streaming and run_manager and delta.text:
                await run_manager.on_llm_new_token(delta.text, chunk=self._chunk(delta))
            return delta

        async def complete(prompt: str) -> list[Completion]:
            stream = self._backend.astream(prompt, None, call.options)
            async with turn, contextlib.aclosing(stream) as deltas:
                return totals([await told(delta) async for delta in deltas])

        tasks = [asyncio.create_task(complete(prompt)) for prompt in prompts]
        try:
            completions = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return self._result(prompts, completions, call)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        call = self._call(stop, kwargs).single()
        with contextlib.closing(self._backend.stream(prompt, None, call.options)) as deltas:
            if call.echo:
                yield GenerationChunk(text=prompt)
            for delta in deltas:
                chunk = self._chunk(delta)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        call = self._call(stop, kwargs).single()
        stream = self._backend.astream(prompt, None, call.options)
        async with contextlib.aclosing(stream) as deltas:
            if call.echo:
                yield GenerationChunk(text=prompt)
            async for delta in deltas:
                chunk = self._chunk(delta)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _chunk(self, delta: Delta) -> GenerationChunk:
        info: dict[str, Any] = {}
        if delta.logprobs is not None:
            info["logprobs"] = logprobs_dict(delta.logprobs)
        if delta.finish_reason is not None:
            info |= {"finish_reason": delta.finish_reason, "model_name": self._backend.model_name}
            info |= {"usage": usage_dict(delta.usage)} if delta.usage else {}
            info |= delta.about or {}
        return GenerationChunk(text=delta.text, generation_info=info or None)

    def _result(
        self, prompts: list[str], completions: list[list[Completion]], call: Call
    ) -> LLMResult:
        generations = [
            [
                Generation(text=prompt * call.echo + done.text, generation_info=self._info(done))
                for done in answers
            ]
            for prompt, answers in zip(prompts, completions, strict=True)
        ]
        counts: Counter[str] = Counter()
        for answers in completions:
            counts.update(token_usage(answers))
        output = {"token_usage": dict(counts), "model_name": self._backend.model_name}
        return LLMResult(generations=generations, llm_output=output)

    def _info(self, done: Completion) -> dict[str, Any]:
        whole = Delta(
            done.text, done.token_ids, done.logprobs, done.finish_reason, done.usage,
            about=done.about,
        )  # fmt: skip
        return self._chunk(whole).generation_info or {}


class HuggingFacePipeline(TextModel):
    """A Hugging Face model, run in this process, that continues a text.

    Args:
        model_id (or model, repo_id): a .gguf file, a directory, "owner/name", "owner/name:Q4_K_M".
        task: "text-generation", the only one.
        device: None, -1 or "cpu". device_map: None, "auto" or "cpu".
        model_kwargs: how to open the model: context_size, threads, chat_template, revision,
            cache_dir, token, local_files_only, quantization, kv_cache_bytes, kv_cache_dtype,
            max_sequences, adapters.
        pipeline_kwargs: options of every request: max_new_tokens, temperature, top_p, stop, ...
            (all of `hfcore.options`), and return_full_text (or skip_prompt, its opposite): whether
            the answer begins with the prompt, default False.
        batch_size: how many prompts of one `generate` or `batch` are in the engine at a time.
        backend: "default" (or "local"), hfcore's own engine; "transformers" (needs the extra of
            that name): there device, device_map, model_kwargs and what pipeline_kwargs has beside
            options of ours go to transformers, as in langchain-huggingface; "auto": here if the
            model can run here, else where `fallback` says (see `hfcore.placement`).
        fallback: None: never anywhere but here. A HuggingFaceEndpoint, or "remote", the same model
            at Hugging Face: where to go when the model cannot be loaded here.
        pipeline: a transformers pipeline that exists, to be run with this interface.

    Options may also be given directly, and with every call; a call's win. Names nobody knows raise
    UnknownOptionError, those that cannot act here InvalidRequestError with the reason. The model
    is opened at first use, and shared by all that name it with the same options.

    >>> import tempfile
    >>> from hfcore.testing import tiny_model
    >>> llm = HuggingFacePipeline(
    ...     model_id=str(tiny_model(tempfile.mkdtemp())), pipeline_kwargs={"max_new_tokens": 4}
    ... )
    >>> llm.get_num_tokens("Hello")
    5
    """

    pipeline: Any = None
    model_id: str
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    pipeline_kwargs: dict[str, Any] = Field(default_factory=dict)
    task: str = "text-generation"
    runs_on: str | None = None
    fallback: Any = None

    def __init__(self, **kwargs: Any) -> None:
        given = _named(kwargs, type(self).model_fields)
        _check_kind(given)
        if given.get("pipeline") is not None or given.get("runs_on") == "transformers":
            self._on_transformers(given)
            return
        device = _device(given.pop("device", None), given.pop("device_map", None))
        loose = {n: given.pop(n) for n in list(given) if n not in type(self).model_fields}
        opening, asking = _sorted_out(
            given.pop("model_kwargs", {}), given.pop("pipeline_kwargs", {}), loose
        )
        device = _device(opening.pop("device", None), None) if device == "cpu" else device
        opening |= {"device": device} if device != "cpu" else {}
        with plain_errors():
            super().__init__(**given | {"model_kwargs": opening, "pipeline_kwargs": asking})
        local = Local(shared_engine(self.model_id, **opening))
        elsewhere = self.fallback is not None or self.runs_on == "auto"
        self._backend = self._placed(local) if elsewhere else local

    def _placed(self, local: Local) -> Placed:
        """The model here, and the same one where `fallback` says."""
        auto = self.runs_on == "auto"
        if isinstance(self.fallback, TextModel):
            other = self.fallback.backend
            if not isinstance(other, Remote):
                raise InvalidRequestError("fallback must be 'remote' or a HuggingFaceEndpoint")
            return Placed(local, other, auto)
        if self.fallback not in (None, "remote"):
            raise InvalidRequestError(
                f"fallback must be 'remote' or a HuggingFaceEndpoint, got {self.fallback!r:.100}"
            )
        token = self.model_kwargs.get("token")
        if hub.looks_local(self.model_id) or Path(self.model_id).exists():
            why_not = f"{self.model_id} is a path, and no URL was given"
            return Placed(local, None, auto, why_not)
        return Placed(local, Remote(make(repo_id=server_name(self.model_id), token=token)), auto)

    def _on_transformers(self, given: dict[str, Any]) -> None:
        """As `__init__`, for a model that transformers runs."""
        pipeline = given.get("pipeline")
        placed: dict[str, Any] = {}
        for name in ("device", "device_map"):
            value = given.pop(name, None)
            placed |= {} if value is None else {name: value}
        loose = {n: given.pop(n) for n in list(given) if n not in type(self).model_fields}
        opening = {**(given.get("model_kwargs") or {}), **placed}
        opening |= {n: loose.pop(n) for n in list(loose) if n in OF_FILES}
        ours, theirs = _split(given.get("pipeline_kwargs") or {})
        asking = options.combine(ours, loose, known=_KNOWN)
        if theirs:
            opening["pipeline_kwargs"] = theirs
        if pipeline is not None and opening:
            name = next(iter(theirs or opening))
            raise InvalidRequestError(
                f"{name} says how to make a pipeline, and the one given exists already"
            )
        if given.get("fallback") is not None:
            raise InvalidRequestError("fallback goes with hfcore's own engine, not transformers")
        if isinstance(opening.get("token"), str):
            opening["token"] = SecretStr(opening["token"])
        theirs = {"runs_on": "transformers", "model_kwargs": opening, "pipeline_kwargs": asking}
        with plain_errors():
            super().__init__(**given | theirs)
        self._backend = Transformers(self.model_id, opening, pipeline)

    @classmethod
    def from_model_id(
        cls,
        model_id: str,
        task: str = "text-generation",
        backend: str = "default",
        device: int | str | None = None,
        device_map: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        batch_size: int = 4,
        **kwargs: Any,
    ) -> HuggingFacePipeline:
        """The same as the constructor."""
        return cls(
            model_id=model_id, task=task, backend=backend, device=device, device_map=device_map,
            model_kwargs=model_kwargs, pipeline_kwargs=pipeline_kwargs, batch_size=batch_size,
            **kwargs,
        )  # fmt: skip

    @property
    def asked(self) -> dict[str, Any]:
        """See TextModel."""
        return self.pipeline_kwargs

    def asking(self, asked: dict[str, Any]) -> Self:
        """See TextModel."""
        return self.model_copy(update={"pipeline_kwargs": asked})

    @property
    def _llm_type(self) -> str:
        return "huggingface_pipeline"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All that an answer depends on, so that caches never mix two models up."""
        return {**self._backend.identity(), "model_id": self.model_id, **self.pipeline_kwargs}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: `langchain_core.load` writes and reads this, by the name of its model."""
        return True

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        opening = {n: v for n, v in self.model_kwargs.items() if n != "token"}
        return {**state, "__dict__": {**state["__dict__"], "model_kwargs": opening}}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """What is never written; `load` looks for it in the environment, if told to."""
        return {"token": "HF_TOKEN"} if "token" in self.model_kwargs else {}

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The token apart from model_kwargs: `load` fills in secrets at the top only."""
        opening = dict(self.model_kwargs)
        token = opening.pop("token", None)
        return {"model_kwargs": opening, "token": token} if token else {}


@dataclass(frozen=True)
class Call:
    """What one call asks of the backend, and what is done with the answer.

    `echo`: it begins with the prompt. `streaming`: callbacks hear of every token, also where
    nobody asked for a stream.
    """

    options: dict[str, Any]
    echo: bool
    streaming: bool = False

    def single(self) -> Call:
        """Itself, if a stream can be made of it."""
        check_single(self.options)
        return self


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Pydantic's ValidationError as ours: the field, what was wanted, what came."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        wanted = first["msg"][:1].lower() + first["msg"][1:]
        shown = "" if first["type"] == "missing" else f", got {first['input']!r:.200}"
        raise InvalidRequestError(f"{name}: {wanted}{shown}") from None


def check_single(asked: Mapping[str, Any]) -> None:
    """Refuse to stream several answers: LangChain's chunks do not say whose they are."""
    n = asked.get("n", 1)
    if isinstance(n, int) and n > 1:
        raise InvalidRequestError(
            f"n={asked['n']} answers cannot be streamed; use invoke or generate,"
            " without streaming=True"
        )


def totals(deltas: Iterable[Delta]) -> list[Completion]:
    """The completions of one request, in the order of their indexes.

    >>> [done.text for done in totals([Delta("a"), Delta("b", index=1), Delta("c")])]
    ['ac', 'b']
    """
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [total(by_index[index]) for index in sorted(by_index)] or [total([])]


def token_usage(answers: Iterable[Completion]) -> dict[str, int]:
    """Counts of one request: its prompt once, the tokens of all its answers; {} if not counted."""
    usages = [done.usage for done in answers if done.usage]
    if not usages:
        return {}
    completed = sum(usage.completion_tokens for usage in usages)
    return usage_dict(Usage(usages[0].prompt_tokens, completed))


def revivable(kind: type[Serializable]) -> None:
    """Let `langchain_core.load` find a class of ours among "all" that it may make.

    Its list of those is made of LangChain's own packages. Who loads must name "hfcore" still, in
    `valid_namespaces`.
    """
    path = tuple(kind.lc_id())
    load.ALL_SERIALIZABLE_MAPPINGS[path] = path
    getattr(load, "_default_class_paths_cache", {}).pop("all", None)  # made before ours were known


def usage_dict(usage: Usage) -> dict[str, int]:
    """Counts under OpenAI's names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def logprobs_dict(logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Log probabilities in OpenAI's form: {"content": [{token, logprob, top_logprobs}]}."""
    return {
        "content": [
            {
                "token": p.token,
                "logprob": p.logprob,
                "top_logprobs": [{"token": t, "logprob": lp} for _, t, lp in p.top],
            }
            for p in logprobs
        ]
    }


def _named(kwargs: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments under one name each; `model` and its aliases are `model_id`."""
    known = (*fields, "model", "device_map", *options.MODEL, *_KNOWN)
    kwargs = {"runs_on" if name == "backend" else name: v for name, v in kwargs.items()}
    given = options.canonical(kwargs, known)
    if given.get("pipeline") is not None:
        model = getattr(given["pipeline"], "model", None)
        given.setdefault("model", getattr(model, "name_or_path", None) or "pipeline")
    if "model" not in given:
        raise InvalidRequestError("model_id is needed: a .gguf file, a directory, or owner/name")
    given["model_id"] = str(given.pop("model"))
    return given


def _check_kind(given: dict[str, Any]) -> None:
    backend = given.pop("runs_on", BACKENDS[0])
    backend = BACKENDS[0] if backend in _HERE else backend
    if backend not in BACKENDS:
        raise InvalidRequestError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != BACKENDS[0]:
        given["runs_on"] = backend
    task = given.get("task", TASKS[0])
    if task not in TASKS:
        raise InvalidRequestError(f"task must be one of {', '.join(TASKS)}, got {task!r}")


def _device(device: Any, device_map: Any) -> str:
    """One device out of both arguments."""
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise InvalidRequestError(f"device_map must name one device, got {device_map!r}")
        device_map = places.pop()
    return options.device(device if device is not None else device_map)


def _sorted_out(*layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """However they were given: how to open the model, what every request asks for."""
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise InvalidRequestError(f"expected a dict of options, got {layer!r:.200}")
    both = options.combine(*layers, known=(*options.MODEL, *_KNOWN))
    if isinstance(both.get("token"), str):
        both["token"] = SecretStr(both["token"])
    opening = {n: v for n, v in both.items() if n in options.MODEL}
    return opening, {n: v for n, v in both.items() if n not in options.MODEL}


def _split(layer: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a pipeline's arguments, options of ours, and what only transformers knows."""
    theirs = {n: v for n, v in layer.items() if n in options.UNSUPPORTED and v is not None}
    return {n: v for n, v in layer.items() if n not in options.UNSUPPORTED}, theirs


def _echo(layer: Mapping[str, Any]) -> bool | None:
    """What a layer says about the prompt in the answer; None when it says nothing."""
    full, skip = layer.get("return_full_text"), layer.get("skip_prompt")
    if full is not None and skip is not None and bool(full) == bool(skip):
        raise InvalidRequestError(f"return_full_text={full} and skip_prompt={skip} contradict")
    if full is not None:
        return bool(full)
    return None if skip is None else not skip


revivable(HuggingFacePipeline)
