"""The engine for Python programs: hub names, option aliases, async, and one engine per model.

The work is done by the compiled `hfcore._core.Engine`; here is only what Python does better.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import _core, at_load, fetch, hub, loops, metrics, options
from .errors import EngineClosedError, InvalidRequestError, ModelFileError

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

Prompt = Any
"""A str (text), a list of message dicts, or token ids (a sequence of int, or an integer array)."""

_HUB = ("quantization", "revision", "cache_dir", "token", "local_files_only")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural log probability; `top`: the likeliest as (id, token, logprob).

    Ids are None where a server does not say them.
    """

    token: str
    token_id: int | None
    logprob: float
    top: tuple[tuple[int | None, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost: counts in tokens, times in seconds since it was submitted.

    `reasoning_tokens`: those of the completion's tokens that are thoughts; None where the model's
    thoughts are not told from its text.
    """

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float = 0.0
    total_time: float = 0.0
    reasoning_tokens: int | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def tokens_per_second(self) -> float:
        """The rate of decoding: tokens after the first, by the time after the first; 0 for one."""
        seconds = self.total_time - self.time_to_first_token
        return (self.completion_tokens - 1) / seconds if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; in a delta, a piece of one.

    `index`: which of the turn's calls. `id` and `name` come with its first piece. `arguments` is
    text: all pieces together are a JSON object.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What one decoded token adds. The last one alone has `finish_reason` and `usage`.

    It has several tokens where a grammar forces them, and where a reader is 64 deltas behind: what
    it has not read is then merged. `text` may be empty: a character may take several tokens, and
    text that might begin a stop string is held back until it is known not to. `reasoning` is text
    of the model's thoughts, `tool_calls` pieces of calls, `index` tells several completions of a
    request apart. `about` of the last one: what else is known of the answer, such as the name that
    a server gives its model.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    index: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    about: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    `finish_reason`: "stop" (it ended by itself, or at a stop string), "tool_calls" (the same, with
    calls in it) or "length".
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str | None
    usage: Usage | None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    about: Mapping[str, Any] | None = None


def total(deltas: Sequence[Delta]) -> Completion:
    """The deltas of one stream, summed.

    >>> total([Delta("he", (1,)), Delta("y", (2,), finish_reason="stop")]).text
    'hey'
    """
    last = deltas[-1] if deltas else Delta()
    logprobs = [p for d in deltas for p in d.logprobs or ()]
    return Completion(
        text="".join(d.text for d in deltas),
        token_ids=tuple(i for d in deltas for i in d.token_ids),
        logprobs=tuple(logprobs) if any(d.logprobs is not None for d in deltas) else None,
        finish_reason=last.finish_reason,
        usage=last.usage,
        reasoning="".join(d.reasoning for d in deltas),
        tool_calls=_calls(deltas),
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs), None),
        about=last.about,
    )


def _calls(deltas: Sequence[Delta]) -> tuple[ToolCall, ...]:
    """The calls whose pieces these deltas hold."""
    calls: dict[int, ToolCall] = {}
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        begun = calls.get(piece.index)
        calls[piece.index] = (
            piece
            if begun is None
            else ToolCall(begun.index, begun.id, begun.name, begun.arguments + piece.arguments)
        )
    return tuple(calls[index] for index in sorted(calls))


class Stream(Iterator[Delta]):
    """An iterator over the deltas of one request. Closing or dropping it cancels the request."""

    def __init__(self, stream: _core.Stream, engine: Engine) -> None:
        self._stream = stream
        self._engine = engine  # which ends when nobody holds it

    def __next__(self) -> Delta:
        return _delta(next(self._stream))

    def close(self) -> None:
        """Cancel the request, if it is still running."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Engine:
    """A model in this process.

    Args:
        model: a .gguf file, a directory, "owner/name" or "owner/name:Q4_K_M".
        device: "cpu" (fast), or "reference" (float32, slow, exact).
        context_size: most tokens of a prompt and its completion; None: what the model was made for.
        threads: threads of the CPU device; None: one for each core that this process may use.
        chat_template: Jinja source to use instead of the model's own.
        kv_cache_bytes: memory for the cache; None: at most a quarter of what is free.
            The system gives it as it is first used.
        kv_cache_dtype: what the cache keeps: "f16", the default, or "int8", which takes about half
            the memory and the reading, and changes answers a little.
        max_sequences: most requests decoded together; more wait their turn.
        prefix_cache: whether what has run stays in the cache, as long as nobody else needs the
            room: requests that begin alike, such as the turns of a chat, share it.
        speculation: whether next tokens are guessed from the text so far and looked at together,
            where that is faster. It changes no token.
        draft_model: a smaller model of the same vocabulary, named as `model` is, that guesses too
            where the text so far does not; as long as that pays. It changes no token.
        adapters: directories of LoRA adapters that PEFT has saved, by name: a request's `adapter`
            names one. A list of directories: their paths are their names.
        quantization: of GGUF files which one: "Q4_K_M". A safetensors checkpoint, or a GGUF file
            in F32, F16 or BF16, is quantised to it while it is loaded: a mixture of
            `hfcore quantize` ("q4_k_m", "q8_0", ...), "nf4" or "fp4".
        quantization_config: the same as transformers says it: a BitsAndBytesConfig or an equal
            dict. Blocks of nf4 and fp4 are bitsandbytes' to the bit; load_in_8bit is q8_0. What
            llm_int8_skip_modules does not name is quantised; without it, all but the head.
            bnb_4bit_compute_dtype changes nothing: weights are multiplied by inputs of 8 bits and
            summed up in float32. What cannot act raises.
        quantization_cache: True, or a directory: what is quantised while loading is kept there
            (True: `quantized` beside hfcore's other caches), for the next time to be quick. Files
            that changed are quantised anew; nothing is ever deleted there.
        revision, cache_dir, token, local_files_only: which files of the hub.
        progress: called as progress(bytes done, bytes in all) while loading; what it raises ends
            the loading. None: a bar on a terminal, if loading takes long.
        others: aliases of these (n_ctx, n_threads, ...).

    Options of `generate`, `stream`, `agenerate` and `astream` (see `hfcore.options`): max_tokens,
    temperature (0 is greedy), top_k, top_p, min_p, typical_p, repetition_penalty,
    frequency_penalty, presence_penalty, logit_bias, seed, do_sample, stop, ignore_eos, logprobs,
    top_logprobs, timeout, priority, adapter; for messages also tools, documents,
    add_generation_prompt, continue_final_message, template_variables; for text
    add_special_tokens. What is not given is as the model's generation_config says.

    Copies are the engine itself. A pickle opens another one where it is read, with the same
    arguments, from the same files if these are there; `token` and `progress` are left out of it, so
    that other files are fetched with the token of whoever reads it. After `os.fork` the child's
    first request starts threads and a cache of its own, with the parent's weights; the parent's
    streams raise there. Dropping the last reference is as good as `close`.

    Raises ModelNotFoundError, ModelFileError, UnsupportedModelError, ModelTooLargeError.

    >>> import tempfile
    >>> from hfcore.testing import tiny_model
    >>> with Engine(tiny_model(tempfile.mkdtemp())) as engine:
    ...     completion = engine.generate("Hello", max_tokens=4, temperature=0)
    >>> completion.finish_reason, completion.usage.completion_tokens
    ('length', 4)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str | int | None = "cpu",
        context_size: int | None = None,
        threads: int | None = None,
        chat_template: str | None = None,
        kv_cache_bytes: int | None = None,
        kv_cache_dtype: str | int | None = None,
        max_sequences: int = 32,
        prefix_cache: bool = True,
        speculation: bool = True,
        draft_model: str | os.PathLike[str] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]]
        | Sequence[str | os.PathLike[str]]
        | None = None,
        quantization: str | at_load.AtLoad | None = None,
        quantization_config: Any = None,
        quantization_cache: bool | str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: Any = None,
        local_files_only: bool | None = None,
        progress: Callable[[int, int], object] | None = None,
        **others: Any,
    ) -> None:
        given: dict[str, Any] = {
            "context_size": context_size, "threads": threads, "chat_template": chat_template,
            "kv_cache_bytes": kv_cache_bytes, "kv_cache_dtype": kv_cache_dtype,
            "prefix_cache": prefix_cache, "speculation": speculation,
            "draft_model": draft_model, "adapters": adapters, "quantization": quantization,
            "quantization_config": quantization_config, "quantization_cache": quantization_cache,
            "revision": revision, "cache_dir": cache_dir, "token": token,
            "local_files_only": local_files_only,
        }  # fmt: skip
        opening = options.canonical(given | others, options.MODEL)
        path, rest = _located(model, opening)
        rest |= {"device": options.device(device), "max_sequences": max_sequences}
        self._closed = False
        with contextlib.closing(LoadBar()) as bar:
            self._core = _core.Engine(path, progress=progress or bar.shown(), **_plain(path, rest))
        self.model = os.fspath(model)
        self.path = path
        opening.pop("quantization_config", None)  # it is in `rest`, as it was understood
        self._opening = {n: v for n, v in (opening | rest).items() if n != "token"}

    def stream(self, prompt: Prompt, **request: Any) -> Stream:
        """Submit now; an iterator of Delta, one for each decoded token.

        `prompt`: str, list of message dicts, or token ids. Raises InvalidRequestError and its
        kinds, TemplateError, NoChatTemplateError, at once.
        """
        return Stream(self._submit(prompt, request), self)

    def generate(self, prompt: Prompt, **request: Any) -> Completion:
        """The whole completion. See `stream`."""
        with self.stream(prompt, **request) as stream:
            return total(list(stream))

    async def astream(self, prompt: Prompt, **request: Any) -> AsyncGenerator[Delta, None]:
        """As `stream`, on an event loop of asyncio (or uvloop) or trio, which it never blocks.

        No thread per stream: all streams of a loop share one file descriptor. `aclose()`, or
        cancelling the task that iterates, cancels the request. Raises RuntimeError where no such
        loop runs.
        """
        submit = functools.partial(self._submit, prompt, request)
        reader = loops.reader(submit, light=_light(prompt, request))
        try:
            while (delta := await reader.next()) is not None:
                yield _delta(delta)
        finally:
            reader.close()

    async def agenerate(self, prompt: Prompt, **request: Any) -> Completion:
        """As `generate`, without blocking the event loop."""
        async with contextlib.aclosing(self.astream(prompt, **request)) as deltas:
            return total([delta async for delta in deltas])

    def _submit(self, prompt: Prompt, request: Mapping[str, Any]) -> _core.Stream:
        return self._core.submit(*_checked_request(prompt, request))

    def render(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> str:
        """Messages as the model's prompt: what `generate` would encode."""
        return self._core.render(messages, **template_options)

    def logits(
        self,
        ids: Sequence[int] | NDArray[Any],
        *,
        last_only: bool = True,
        adapter: str | None = None,
    ) -> NDArray[np.float32]:
        """Logits after the last of `ids`: float32 [vocab]; or after each: [len(ids), vocab]."""
        return self._core.logits(ids, last_only=last_only, adapter=adapter)

    def save_prefix(self, path: str | os.PathLike[str]) -> int:
        """Write what the cache holds of texts that have run to a file; how many tokens that is.

        `load_prefix` takes it up in an engine of the same model files and kv_cache_dtype: what
        begins with one of these texts need not run there. The files are read once, to name them by
        their SHA-256. What ran with an adapter is left out. Raises InvalidRequestError without a
        prefix_cache, ModelFileError where the file cannot be written.

        >>> import pathlib, tempfile
        >>> from hfcore.testing import tiny_model
        >>> directory = pathlib.Path(tempfile.mkdtemp())
        >>> with Engine(tiny_model(directory)) as engine:
        ...     _ = engine.generate("A long text that many requests begin with", max_tokens=1)
        ...     saved = engine.save_prefix(directory / "prefix")
        >>> with Engine(directory / "tiny.gguf") as engine:
        ...     engine.load_prefix(directory / "prefix") == saved
        True
        """
        return self._core.save_prefix(path, self._digest)

    def load_prefix(self, path: str | os.PathLike[str]) -> int:
        """Take what `save_prefix` wrote into the cache; how many of its tokens are there now.

        What is there already stays; where there is no room for all, a part is taken. Raises as
        `save_prefix`, and ModelFileError for a file that is damaged or another model's.
        """
        return self._core.load_prefix(path, self._digest)

    @functools.cached_property
    def _digest(self) -> str:
        files = hub.digest(self.path)
        wish = self._opening.get("quantization")
        # The same files, quantised otherwise, are another model.
        return hub.digest_of(files, wish) if isinstance(wish, at_load.AtLoad) else files

    @property
    def tokenizer(self) -> _core.Tokenizer:
        """The model's tokenizer."""
        return self._core.tokenizer

    @property
    def chat_template(self) -> _core.ChatTemplate | None:
        """The template that messages go through, or None."""
        return self._core.chat_template

    @property
    def info(self) -> dict[str, Any]:
        """Path, architecture, sizes, quantisation, device, generation defaults."""
        return self._core.info

    def metrics(self) -> dict[str, int | float]:
        """What the engine did since it was opened (in this process), and does now.

        `requests` accepted, `prompt_tokens` of them, `completion_tokens` generated, `steps` of the
        model, which took `seconds_busy`, `preemptions`, requests `cancelled` before their end; now:
        completions `running` and `waiting`, cache pages of `pages_total` that they have
        (`pages_used`) and that are kept for others (`pages_cached`); `tokens_per_second`, of
        completions; `memory_bytes`, resident, of the whole process (Linux only). Of the tokens
        looked for in the cache (`prefix_lookup_tokens`) those found (`prefix_hit_tokens`,
        `prefix_hit_rate`), of the guessed ones (`drafted_tokens`) those that came true
        (`accepted_tokens`, `acceptance_rate`).
        """
        return metrics.completed(self._core.metrics())

    def metrics_text(self, prefix: str = "hfcore") -> str:
        """`metrics()` in Prometheus' text format 0.0.4, labelled by `model`.

        For several engines see `hfcore.metrics.exposition`. Raises InvalidRequestError for a prefix
        that no metric's name can begin with.
        """
        return metrics.exposition([(self.model, self.metrics())], prefix)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """End the engine and free its memory; running requests get EngineClosedError."""
        self._closed = True
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closed:
            raise EngineClosedError("a closed engine cannot be pickled")
        return _reopened, (type(self), self.model, self.path.absolute(), self._opening)

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r}{', closed' if self._closed else ''})"


def _reopened(kind: type[Engine], model: str, path: Path, opening: dict[str, Any]) -> Engine:
    """The engine of a pickle: of the same files where they are here, else of the same name."""
    if not path.exists():
        return kind(model, **opening)
    kept = {n: v for n, v in opening.items() if n not in _HUB or isinstance(v, at_load.AtLoad)}
    engine = kind(path, **kept)
    engine.model, engine._opening = model, opening
    return engine


def _located(
    model: str | os.PathLike[str], opening: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """The files of a model, and how to open it where they and those of its draft model are."""
    place = {n: v for n, v in opening.items() if n in _HUB}
    rest = {n: v for n, v in opening.items() if n not in _HUB}
    wish = place.get("quantization")
    wanted = at_load.wanted(wish, rest.pop("quantization_config", None))
    if isinstance(wish, at_load.AtLoad):
        del place["quantization"]
    if "draft_model" in rest:
        # Which of its files the model takes says nothing of another model's.
        other = {n: v for n, v in place.items() if n not in {"quantization", "revision"}}
        rest["draft_model"] = hub.resolve(rest["draft_model"], **other).absolute()
    path = hub.resolve(model, **place)
    if wanted is None or isinstance(wish, str):
        left = hub.left_to_make(model, path, wish)
        wanted = None if left is None else at_load.AtLoad(left)
    return path, rest | ({} if wanted is None else {"quantization": wanted})


def _plain(path: Path, rest: Mapping[str, Any]) -> dict[str, Any]:
    """How to open a model, as the compiled engine takes it."""
    wish = rest.get("quantization")
    plain = {**rest, "quantization": wish and (wish.name, wish.nested, list(wish.skip))}
    cache = plain.pop("quantization_cache", None)
    if cache is None or cache is False:
        return plain
    return {**plain, "quantization_cache": _prepared(cache, path, wish)}


def _prepared(cache: Any, path: Path, wish: at_load.AtLoad | None) -> Path:
    """The file that keeps what a model is quantised to; files that changed have another."""
    if cache is True:
        folder = fetch.cache_dir().parent / "quantized"
    elif isinstance(cache, str | os.PathLike):
        folder = Path(cache).expanduser()
    else:
        raise InvalidRequestError(f"quantization_cache must be True or a directory, got {cache!r}")
    if wish is None:
        raise InvalidRequestError(
            "quantization_cache has nothing to keep: nothing is quantised while it is loaded;"
            " quantization says to what"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelFileError(f"{folder}: {error.strerror}", path=str(folder)) from error
    return folder / f"{hub.digest_of(hub.identity(path), wish)}.hfcoreqt"


class LoadBar:
    """A line on a terminal that says how far work is; quick work and pipes never see it.

    `each`: what is counted is shown in so many, as `unit`.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        patience: float = 0.5,
        *,
        doing: str = "loading",
        unit: str = "MB",
        each: float = 1e6,
    ) -> None:
        self._out = out or sys.stderr
        self._start = time.monotonic() + patience
        self._doing, self._unit, self._each = doing, unit, each
        self._drawn = False

    def shown(self) -> Callable[[int, int], object] | None:
        """What to report to; None where nobody looks, or bars are not wanted."""
        wanted = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0") in ("", "0")
        return self._report if wanted and self._out.isatty() else None

    def close(self) -> None:
        """Wipe the line."""
        if self._drawn:
            self._out.write("\r\x1b[K")
            self._out.flush()

    def _report(self, done: int, whole: int) -> None:
        if time.monotonic() < self._start:
            return
        self._drawn = True
        filled = 30 * done // max(whole, 1)
        bar = "#" * filled + "." * (30 - filled)
        counted = f"{done / self._each:.0f} of {whole / self._each:.0f} {self._unit}"
        self._out.write(f"\r{self._doing} [{bar}] {counted}")
        self._out.flush()


# One engine per model -----------------------------------------------------------------------------


class Hidden:
    """A token that is not printed; pydantic's SecretStr, for who does without pydantic."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def get_secret_value(self) -> str:
        """The token."""
        return self._secret

    def __repr__(self) -> str:
        return "Hidden('**********')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hidden) and other._secret == self._secret

    def __hash__(self) -> int:
        return hash(self._secret)


@dataclass(eq=False)
class SharedEngine:
    """A model by name, opened at first use, and once per process for equal names and options.

    Cheap to make, to copy and to pickle: a copy finds the same engine again, another process opens
    its own (so does a child after fork), with a token of its own. The engine lives as long as some
    holder that used it.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    _engine: Engine | None = field(default=None, init=False, repr=False)
    _pid: int = field(default=0, init=False, repr=False)

    def get(self) -> Engine:
        """The engine; opened now if nobody did before. Raises what `Engine` does."""
        if self._engine is None or self._pid != os.getpid() or self._engine.closed:
            self._engine, self._pid = _open_shared(self.model, self.options), os.getpid()
        return self._engine

    @property
    def loaded(self) -> bool:
        """Whether `get` would return at once."""
        return self._engine is not None and self._pid == os.getpid() and not self._engine.closed

    def identity(self) -> dict[str, Any]:
        """The model's files and what else of its opening can change an answer.

        Opens nothing and asks no network: files that are not here yet are named only.
        """
        where = {n: v for n, v in self.options.items() if n in _HUB and n != "token"}
        where.pop("local_files_only", None)
        shape = {n: v for n, v in self.options.items() if n in _SHAPES_ANSWERS}
        for name, directory in self.options.get("adapters", ()):
            with contextlib.suppress(OSError):
                shape[f"adapter {name}"] = hub.identity(Path(directory))
        try:
            path = (
                self._engine.path
                if self._engine
                else hub.resolve(self.model, **{**self.place(), "local_files_only": True})
            )
            files = hub.identity(path)
        except (OSError, ValueError):
            files = {}
        return {"model": self.model, **{n: str(v) for n, v in where.items()}, **shape, **files}

    def place(self) -> dict[str, Any]:
        """Of its options those that say which files."""
        return {n: v for n, v in self.options.items() if n in _HUB}

    def __copy__(self) -> SharedEngine:
        return SharedEngine(self.model, self.options)

    def __deepcopy__(self, memo: object) -> SharedEngine:
        return SharedEngine(self.model, self.options)

    def __getstate__(self) -> dict[str, Any]:
        options = {n: v for n, v in self.options.items() if n != "token"}
        return {"model": self.model, "options": options, "_engine": None, "_pid": 0}


_SHAPES_ANSWERS = (
    "device", "context_size", "chat_template", "kv_cache_dtype", "quantization_config",
)  # fmt: skip


def shared_engine(model: str | os.PathLike[str], **opening: Any) -> SharedEngine:
    """A holder for a model that is opened at first use and shared (names as for `Engine`).

    >>> shared_engine("owner/name", n_ctx=512)
    SharedEngine(model='owner/name', options={'context_size': 512})
    """
    named = options.canonical(opening, options.MODEL)
    if "device" in named:
        named["device"] = options.device(named["device"])
    if isinstance(named.get("token"), str):
        named["token"] = Hidden(named["token"])
    return SharedEngine(os.fspath(model), named)


_registry: weakref.WeakValueDictionary[Any, Engine] = weakref.WeakValueDictionary()
_locks: dict[Any, threading.Lock] = {}
_registry_lock = threading.Lock()
_inherited: list[Any] = []


def _open_shared(model: str, opening: Mapping[str, Any]) -> Engine:
    """The one engine for these files and options; others who want the same wait for it."""
    path, rest = _located(model, opening)
    key = (os.path.realpath(path), tuple(sorted(rest.items())))
    with _registry_lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        engine = _registry.get(key)
        if engine is None or engine.closed:
            engine = Engine(path, **rest)
            _registry[key] = engine
        return engine


def _after_fork() -> None:
    """A child has none of its parent's threads: it opens its own engines, and never frees those."""
    global _registry_lock
    _registry_lock = threading.Lock()
    _locks.clear()
    _inherited.extend(_registry.values())
    _registry.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Small conversions --------------------------------------------------------------------------------


def _checked_request(prompt: Prompt, given: Mapping[str, Any]) -> tuple[Prompt, dict[str, Any]]:
    """A prompt and the options that go with it."""
    prompt = _checked(prompt)
    messages = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
    return prompt, options.request(given, messages=messages)


def _light(prompt: Prompt, request: Mapping[str, Any]) -> bool:
    """Whether a request takes well below a millisecond to submit: little to render and encode."""
    if any(request.get(name) is not None for name in _HEAVY):
        return False
    texts = prompt if isinstance(prompt, list) else [prompt]
    return sum(map(_letters, texts[:_LIGHT])) < _LIGHT


def _letters(item: object) -> int:
    """Of a text, of a message, of a token id; too many where a look does not tell."""
    text = item.get("content") if isinstance(item, Mapping) else item
    return len(text) if isinstance(text, str) else 1 if isinstance(text, int) else _LIGHT


_LIGHT = 400
"""Letters of a prompt that are rendered and encoded in a fraction of a millisecond."""

_HEAVY = (*options.CONSTRAINT, *options.TEMPLATE, "adapter")


def _checked(prompt: Prompt) -> Prompt:
    """Refuse what is no prompt; what one holds is checked by the engine."""
    if isinstance(prompt, str | Mapping) or not hasattr(prompt, "__len__"):
        if not isinstance(prompt, str):
            raise InvalidRequestError(
                "a prompt is a str, a list of message dicts or token ids,"
                f" got {type(prompt).__name__}"
            )
        return prompt
    if len(prompt) == 0:
        raise InvalidRequestError("the prompt is empty: no messages, no tokens")
    return prompt


def _delta(delta: _core.Delta) -> Delta:
    usage = delta.usage
    return Delta(
        delta.text,
        tuple(delta.token_ids),
        None if delta.logprobs is None else tuple(map(_logprob, delta.logprobs)),
        delta.finish_reason,
        usage
        and Usage(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.time_to_first_token,
            usage.total_time,
            usage.reasoning_tokens,
        ),
        delta.reasoning,
        tuple(ToolCall(*call) for call in delta.tool_calls),
        delta.index,
        None if delta.prompt_logprobs is None else tuple(map(_logprob, delta.prompt_logprobs)),
    )


def _logprob(p: _core.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(p.token, p.token_id, p.logprob, tuple(p.top))
