"""A transformers model behind the same `Backend` as our own engine: for what only torch runs.

It goes by the public API of transformers alone: `generate` on a thread, with a streamer that hands
tokens over, a processor that reads logits, and a criterion that ends it. Prompts, options, stop
strings and tool calls are ours, the model and its tokenizer are theirs. Nothing binds an answer to
a grammar here, so what needs one is refused. One request of a process runs at a time: torch draws
from one generator of random numbers, and a seed must mean something.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import queue
import re
import threading
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _core, hub
from .backends import Deltas, first_accepted
from .engine import Delta, Prompt, TokenLogprob, ToolCall, Usage
from .errors import (
    ContextOverflowError,
    HfcoreError,
    InternalError,
    InvalidRequestError,
    ModelFileError,
    ModelNotFoundError,
    NoChatTemplateError,
    RequestTimeoutError,
    UnsupportedModelError,
)

USUAL_MAX_TOKENS = 256
"""What a pipeline of transformers generates at most where nobody says."""

OF_FILES = ("revision", "cache_dir", "token", "local_files_only", "trust_remote_code", "subfolder")
"""Arguments that say which files, for the tokenizer as for the model."""

_DEFAULTS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "max_new_tokens", "eos_token_id",
)  # fmt: skip
"""What is taken from a generation config where a request says nothing."""

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")

_turn = threading.Lock()


def require() -> None:
    """Raise UnsupportedModelError, which says what to install, where something is missing."""
    missing = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedModelError(
            f"backend 'transformers' needs {' and '.join(missing)}, not installed here:"
            " pip install 'hfcore[transformers]'",
            what="backend",
            name="transformers",
        )


@dataclass
class Transformers:
    """A model that transformers runs: opened at first use, or given as a pipeline.

    `opening`: device, device_map and what else `from_pretrained` takes (revision, token,
    quantization_config, ...).
    """

    model: str
    opening: dict[str, Any] = field(default_factory=dict)
    pipeline: Any = None
    takes_parts = False

    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _given: bool = field(default=False, init=False, repr=False)
    _templates: dict[str, _core.ChatTemplate] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._given = self.pipeline is not None
        if self._given:
            _check(self.pipeline)
        require()

    @property
    def model_name(self) -> str:
        """See `Backend`, as for all of these."""
        return self.model

    def opened(self) -> Any:
        """The pipeline; made now if nobody did before."""
        with self._lock:
            if self.pipeline is None:
                self.pipeline = _open(self.model, self.opening)
            return self.pipeline

    def stream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> Deltas:
        """Check and render, start a thread, iterate."""
        return self._start(prompt, tools, options, lambda: None)

    async def astream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> AsyncGenerator[Delta, None]:
        """The same on an event loop of asyncio, which it does not block."""
        import asyncio

        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # of a loop that has been closed
                loop.call_soon_threadsafe(arrived.set)

        stream = await asyncio.to_thread(self._start, prompt, tools, options, tell)
        try:
            while True:
                arrived.clear()
                try:
                    delta = stream.next_now()
                except StopIteration:
                    return
                if delta is None:
                    await arrived.wait()
                else:
                    yield delta
        finally:
            stream.close()

    def token_ids(self, text: str) -> list[int]:
        """By the model's tokenizer, special ones not added."""
        ids = self.opened().tokenizer(text, add_special_tokens=False)["input_ids"]
        return [int(i) for i in ids]

    def count_tokens(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> int:
        """Of the rendered prompt."""
        return len(self.token_ids(self._turn(prompt, tools, {}).prompt))

    def identity(self) -> dict[str, Any]:
        """Files and how they are opened; of a pipeline that was given, that it is this one."""
        about: dict[str, Any] = {"backend": "transformers", "model": self.model}
        if self._given:
            return {**about, "pipeline": _name_of(self.pipeline)}
        try:
            files = hub.identity(hub.resolve(self.model, local_files_only=True))
        except (OSError, ValueError, HfcoreError):
            files = {}
        opening = {name: str(v) for name, v in self.opening.items() if name != "token"}
        return {**about, **opening, **files}

    @property
    def context_size(self) -> int | None:
        """As the model's config has it, where it is open."""
        return None if self.pipeline is None else _context_size(self.pipeline.model)

    def sibling(self, model: str) -> Transformers:
        """Another model, opened the same way."""
        if self._given:
            raise InvalidRequestError(
                f"model={model!r} cannot be opened: this llm is a pipeline that was given to it"
            )
        theirs = ("revision", "subfolder")
        return Transformers(model, {n: v for n, v in self.opening.items() if n not in theirs})

    def __copy__(self) -> Transformers:
        return self

    def __deepcopy__(self, memo: object) -> Transformers:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "opening": {n: v for n, v in self.opening.items() if n != "token"},
            "pipeline": self.pipeline if self._given else None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _start(
        self,
        prompt: Prompt,
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        tell: Callable[[], None],
    ) -> Running:
        make = self._turns(prompt, tools, options)
        chat = not isinstance(prompt, str)
        running = Running(_Request(self.opened(), make, chat=chat), tell)
        running.start()
        return running

    def _turn(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> _core.Turn:
        return self._turns(prompt, tools, options)()

    def _turns(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> Callable[[], _core.Turn]:
        """What makes a turn of this prompt, once for each of its answers."""
        pipeline = self.opened()
        config = _defaults(pipeline)
        asked = dict(options) | ({"tools": list(tools)} if tools else {})
        template = None if isinstance(prompt, str) else self._template(tools)

        def made(shape: Prompt) -> _core.Turn:
            return _core.Turn(shape, asked, template=template, generation_config=config)

        shapes: list[Prompt] = []

        def accepted(shape: Prompt) -> None:
            made(shape)
            shapes.append(shape)

        first_accepted(prompt, accepted)
        return lambda: made(shapes[0])

    def _template(self, tools: object) -> _core.ChatTemplate:
        tokenizer = self.opened().tokenizer
        source = tokenizer.chat_template
        if isinstance(source, Mapping):
            named = source.get("tool_use") if tools else None
            source = named or source.get("default")
        if not source:
            raise NoChatTemplateError(
                f"{self.model} has no chat template; pass chat_template=, or a plain text prompt",
                model=self.model,
            )
        if source not in self._templates:
            special = {
                name: value
                for name, value in tokenizer.special_tokens_map.items()
                if isinstance(value, str)
            }
            self._templates[source] = _core.ChatTemplate(source, special_tokens=special)
        return self._templates[source]


# One request --------------------------------------------------------------------------------------


class Running(Iterator[Delta]):
    """A request on its thread. Closing or dropping it ends that after the token under way."""

    def __init__(self, request: _Request, tell: Callable[[], None]) -> None:
        self._request = request
        self._arrived: queue.SimpleQueue[Delta | BaseException | None] = queue.SimpleQueue()
        self._over = False
        self._thread = threading.Thread(
            target=request.run,
            args=(self._arrived.put, tell),
            name="hfcore-transformers",
            daemon=True,
        )

    def start(self) -> None:
        """Begin; what is wrong with the request has been raised before."""
        self._thread.start()

    def __next__(self) -> Delta:
        return self._taken(self._arrived.get() if not self._over else None)

    def next_now(self) -> Delta | None:
        """The next delta if it is there, None if not yet. Raises StopIteration after the last."""
        if self._over:
            raise StopIteration
        try:
            return self._taken(self._arrived.get_nowait())
        except queue.Empty:
            return None

    def close(self) -> None:
        """Cancel, unless it has ended."""
        self._over = True
        self._request.cancelled.set()

    def __del__(self) -> None:
        self._request.cancelled.set()

    def _taken(self, item: Delta | BaseException | None) -> Delta:
        if isinstance(item, Delta):
            return item
        self._over = True
        if item is None:
            raise StopIteration
        raise item


class _Request:
    """What one request asks of `generate`, and its answers one after the other."""

    def __init__(self, pipeline: Any, make: Callable[[], _core.Turn], *, chat: bool) -> None:
        self.pipeline = pipeline
        self.cancelled = threading.Event()
        self.submitted = time.perf_counter()
        self._make = make
        self.turn = make()
        self.asked: dict[str, Any] = self.turn.options
        special = False if chat else self.asked["add_special_tokens"] is not False
        encoded = pipeline.tokenizer(
            self.turn.prompt, add_special_tokens=special, return_tensors="pt"
        )
        self.inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        self.prompt_tokens = int(self.inputs["input_ids"].shape[1])
        limit = _context_size(pipeline.model)
        if self.prompt_tokens == 0:
            raise InvalidRequestError("prompt must have at least 1 token, got 0")
        if limit is not None and self.prompt_tokens >= limit:
            raise ContextOverflowError(
                f"prompt has {self.prompt_tokens} tokens, the context holds {limit}",
                prompt_tokens=self.prompt_tokens,
                limit=limit,
            )
        wanted = self.asked["max_tokens"] or USUAL_MAX_TOKENS
        room = wanted if limit is None else limit - self.prompt_tokens
        self.max_tokens = min(wanted, room)
        ignored = self.asked["ignore_eos"]
        self.ends = [*self.asked["stop_token_ids"], *([] if ignored else _ends(pipeline))]

    def run(self, put: Callable[[Any], None], tell: Callable[[], None]) -> None:
        """All answers, on the request's thread; then None, or what went wrong."""

        def hand(item: Delta | BaseException | None) -> None:
            put(item)
            tell()

        try:
            for index in range(self.asked["n"]):
                self._answer(index, hand)
            hand(None)
        except HfcoreError as error:
            hand(error)
        except BaseException as error:
            mapped = InternalError(f"transformers: {type(error).__name__}: {error}")
            mapped.__cause__ = error
            hand(mapped)

    def over(self) -> bool:
        """Whether nobody waits any more. Raises RequestTimeoutError when the time is up."""
        timeout = self.asked["timeout"]
        if timeout is not None and time.perf_counter() - self.submitted >= timeout:
            raise RequestTimeoutError(
                f"the request took longer than its timeout of {timeout} s", timeout=timeout
            )
        return self.cancelled.is_set()

    def _answer(self, index: int, hand: Callable[[Delta], None]) -> None:
        answer = _Answer(self, self.turn if index == 0 else self._make(), index, hand)
        while not _turn.acquire(timeout=0.05):
            if self.over():
                return
        try:
            if self.over():
                return
            model = self.pipeline.model
            with _drawing(self.asked["seed"], index, model):
                model.generate(
                    **{name: tensor.to(model.device) for name, tensor in self.inputs.items()},
                    **_generation(self),
                    streamer=answer,
                    stopping_criteria=[answer.ended],
                    logits_processor=[answer.seen],
                )
        finally:
            _turn.release()
        if not self.over():
            answer.finish()


class _Answer:
    """One answer: `generate`'s streamer, what reads its logits, and what ends it."""

    def __init__(
        self, request: _Request, turn: _core.Turn, index: int, hand: Callable[[Delta], None]
    ) -> None:
        self._request = request
        self._turn = turn
        self._index = index
        self._hand = hand
        self._text = _Text(request.pipeline.tokenizer, turn, request.asked)
        self._ids: list[int] = []
        self._prompt = True
        self._first: float | None = None
        self._thoughts = 0
        self._row: Any = None

    def put(self, value: Any) -> None:
        """Take the prompt, which comes first, and then token after token."""
        if self._prompt:
            self._prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._take(int(token))

    def end(self) -> None:
        """Nothing more comes; `finish` says why."""

    def ended(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        """A stopping criterion: a stop string came, nobody waits, or the time is up."""
        import torch

        over = self._turn.stopped or self._request.over()
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool, device=input_ids.device)

    def seen(self, input_ids: Any, scores: Any) -> Any:
        """A logits processor: penalties and biases that transformers lacks, and log probabilities.

        It comes before temperature and what cuts, as the log probabilities are defined.
        """
        import torch

        asked = self._request.asked
        new = input_ids[0, self._request.prompt_tokens :]
        if len(new) and (asked["frequency_penalty"] or asked["presence_penalty"]):
            ids, counts = new.unique(return_counts=True)
            scores = scores.clone()
            scores[0, ids] -= asked["frequency_penalty"] * counts + asked["presence_penalty"]
        if asked["logit_bias"]:
            scores = scores.clone()
            for token, bias in asked["logit_bias"]:
                scores[0, token] += bias
        if asked["logprobs"]:
            by = asked["temperature"] if asked["do_sample"] else 1.0
            self._row = torch.log_softmax(scores[0].float() / by, dim=-1)
        return scores

    def finish(self) -> None:
        """The last delta: what was held back, why it ended, what it cost."""
        reason = "length"
        stopped = self._turn.stopped
        if stopped or (self._ids and self._ids[-1] in self._request.ends):
            reason = "tool_calls" if self._turn.called else "stop"
        pieces = [self._turn.push(self._text.rest()), self._turn.finish()]
        if not stopped and self._turn.called and reason == "stop":
            reason = "tool_calls"
        now = time.perf_counter() - self._request.submitted
        usage = Usage(
            self._request.prompt_tokens,
            len(self._ids),
            now if self._first is None else self._first,
            now,
            None if self._turn.in_thought is None else self._thoughts,
        )
        self._hand(_delta(pieces, self._index, finish_reason=reason, usage=usage))

    def _take(self, token: int) -> None:
        self._first = self._first or time.perf_counter() - self._request.submitted
        self._ids.append(token)
        text = "" if token in self._request.ends else self._text.push(token)
        before = self._turn.in_thought
        piece = self._turn.push(text, may_stop=len(self._ids) >= self._request.asked["min_tokens"])
        self._thoughts += bool((before and self._turn.in_thought) or piece[1])
        logprobs = None if self._row is None else (self._logprob(token),)
        self._hand(_delta([piece], self._index, token_ids=(token,), logprobs=logprobs))

    def _logprob(self, token: int) -> TokenLogprob:
        row = self._row
        count = min(self._request.asked["top_logprobs"], len(row))
        values, ids = row.topk(count)
        text = self._request.pipeline.tokenizer.decode
        top = tuple((i, text([i]), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(text([token]), token, float(row[token]), top)


class _Text:
    """The text of an answer as its tokens come, never half a character."""

    def __init__(self, tokenizer: Any, turn: _core.Turn, asked: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._hidden: set[int] = set()
        if asked["skip_special_tokens"]:
            added = tokenizer.added_tokens_decoder.items()
            self._hidden = {i for i, token in added if token.special} | {*tokenizer.all_special_ids}
            self._hidden -= {*tokenizer.convert_tokens_to_ids(turn.markers)}
        self._ids: list[int] = []
        self._start = 0  # of the tokens that the next piece is decoded with, and
        self._done = 0  # of those whose text has been given

    def push(self, token: int) -> str:
        """What is certain now."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        # Bytes that SentencePiece falls back on are read together, when the last of them is there.
        if _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            return ""
        piece = self.rest()
        if piece.endswith("\ufffd"):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return piece

    def rest(self) -> str:
        """What has not been given yet."""
        before = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


# Small conversions --------------------------------------------------------------------------------


def _delta(pieces: Sequence[tuple[str, str, list[Any]]], index: int, **more: Any) -> Delta:
    return Delta(
        text="".join(text for text, _, _ in pieces),
        reasoning="".join(thought for _, thought, _ in pieces),
        tool_calls=tuple(ToolCall(*call) for _, _, calls in pieces for call in calls),
        index=index,
        **more,
    )


def _generation(request: _Request) -> dict[str, Any]:
    """The arguments of `generate`: all that a request or its model's defaults say, by name."""
    asked, tokenizer = request.asked, request.pipeline.tokenizer
    pad = tokenizer.pad_token_id
    given: dict[str, Any] = {
        **_own(request.pipeline)[1],
        "num_beams": 1,
        "num_return_sequences": 1,
        "max_new_tokens": request.max_tokens,
        "do_sample": asked["do_sample"],
        "repetition_penalty": asked["repetition_penalty"],
        "eos_token_id": request.ends or None,
        "pad_token_id": pad if pad is not None else (request.ends or [0])[0],
    }
    if asked["min_tokens"] and request.ends:
        given["min_new_tokens"] = asked["min_tokens"]
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    # None: else the model's own would apply, and warn that they do nothing.
    return given | {name: asked[name] if asked["do_sample"] else None for name in names}


@contextlib.contextmanager
def _drawing(seed: int | None, index: int, model: Any) -> Iterator[None]:
    """torch's generator begins at a seed, and goes on afterwards as if nothing had been drawn."""
    if seed is None:
        yield
        return
    import torch

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed + index) % 2**64)
        yield


def _own(pipeline: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a pipeline was made with -> what stands for options of ours, and what else it asks for.

    It keeps that to itself, under a name that changed between versions.
    """
    given: dict[str, Any] = {}
    for name in ("_forward_params", "_generate_kwargs"):
        given |= getattr(pipeline, name, None) or {}
    config = given.pop("generation_config", None)
    fields = set(vars(pipeline.model.generation_config))
    if config is not None:
        given = {**config.to_diff_dict(), **given}
    given = {name: v for name, v in given.items() if name in fields and v is not None}
    given.pop("transformers_version", None)
    defaults = {name: given.pop(name) for name in _DEFAULTS if name in given}
    return defaults, given


def _defaults(pipeline: Any) -> dict[str, Any]:
    """What applies where a request says nothing: as the pipeline was made, else the model's own."""
    config = pipeline.model.generation_config
    of_model = {name: getattr(config, name, None) for name in _DEFAULTS}
    both = of_model | _own(pipeline)[0]
    return {name: value for name, value in both.items() if value is not None}


def _ends(pipeline: Any) -> list[int]:
    eos = _defaults(pipeline).get("eos_token_id", pipeline.tokenizer.eos_token_id)
    if eos is None:
        return []
    return [int(i) for i in eos] if isinstance(eos, Sequence) else [int(eos)]


def _context_size(model: Any) -> int | None:
    config = model.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Pipelines that were given, by names that no other has: what they hold may be anything."""


def _name_of(pipeline: Any) -> str:
    return _names.setdefault(pipeline, uuid.uuid4().hex)


def _check(pipeline: Any) -> None:
    """Refuse what is no pipeline that continues texts, and what would be lost of it."""
    task = getattr(pipeline, "task", None)
    model, tokenizer = getattr(pipeline, "model", None), getattr(pipeline, "tokenizer", None)
    if task != "text-generation" or model is None or tokenizer is None:
        raise InvalidRequestError(
            "pipeline must be a transformers pipeline for 'text-generation',"
            f" got {type(pipeline).__name__}{f' for {task!r}' if task else ''}"
        )
    refused = {
        "num_beams": "one sequence is decoded, by sampling or greedily",
        "num_return_sequences": "use n",
        "max_length": "it counts the prompt too; use max_new_tokens",
        "stop_strings": "use stop",
    }
    for name, value in _own(pipeline)[1].items():
        if name in refused and value != 1:
            raise InvalidRequestError(
                f"the pipeline was made with {name}={value!r:.200}: {refused[name]}"
            )


def _open(model: str, opening: Mapping[str, Any]) -> Any:
    """A pipeline of a model that transformers finds."""
    import transformers

    given = copy.copy(dict(opening))
    device, device_map = given.pop("device", None), given.pop("device_map", None)
    generation = given.pop("pipeline_kwargs", None) or {}
    if hasattr(given.get("token"), "get_secret_value"):
        given["token"] = given["token"].get_secret_value()
    files = {name: given[name] for name in OF_FILES if name in given}
    if device_map is not None:
        given["device_map"] = device_map
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **files)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, **given)
    except ImportError as error:
        raise UnsupportedModelError(f"{model}: {error}", what="backend", name=model) from error
    except OSError as error:
        raise ModelNotFoundError(f"{model}: {error}", path=model) from error
    except (ValueError, KeyError) as error:
        raise ModelFileError(f"{model}: {error}", path=model) from error
    fields = set(vars(loaded.generation_config))
    for name in generation:
        if name not in fields:
            raise InvalidRequestError(
                f"pipeline_kwargs: {name}={generation[name]!r:.200} cannot be passed on to generate"
            )
    placed = {} if device_map is not None or device is None else {"device": device}
    made = transformers.pipeline(
        "text-generation", model=loaded, tokenizer=tokenizer, **placed, **generation
    )
    _check(made)
    return made
