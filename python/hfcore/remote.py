"""A model behind an inference server, as a `Backend`: options -> a request, events -> Delta.

What it speaks (`wire`): OpenAI's chat and text completions, with the fields that vLLM, SGLang, TGI
and llama.cpp take beside them, and TGI's own text generation. How a request gets there is
`connection`'s business, what comes back that of `answers`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .answers import UNNAMED, Answer
from .connection import Attempts, Clock, Connection, Request, asleep, in_thread, make
from .engine import Delta, Prompt
from .errors import InvalidRequestError, RemoteError, RemoteNotFoundError
from .responses import DONE
from .urls import is_url
from .wire import CHAT, COMPLETION, GENERATE, bodies, completion_fields

TASKS = ("text-generation", "conversational")
WHOLE = "whole_answer"
"""The option by which who wants no stream says so: not all servers stream calls, counts, errors."""

_SIGNATURE = (
    "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty",
    "response_format", "seed", "stop", "stream_options", "temperature", "tool_choice", "tools",
    "top_logprobs", "top_p",
)  # fmt: skip
"""What InferenceClient.chat_completion names; the rest is its `extra_body`."""

_OURS = ("timeout", "max_retries", "stream_usage", "extra_body", WHOLE)
"""Options of a request that are no field of it."""

_RESERVED = ("messages", "prompt", "inputs", "stream")

_ENDS = re.compile(r"/(?:chat/completions|completions|generate_stream|generate)\Z")
_VERSION = re.compile(r"/v\d+[\w.-]*\Z")
_NO_TASK = re.compile(r"\btask\b|text-generation", re.IGNORECASE)


@dataclass
class Remote:
    """A model at a server.

    `task`: None chooses by the prompt (messages: a chat; a text: text generation, or a chat where
    that alone is offered); "text-generation" and "conversational" say it of texts.
    """

    connection: Connection
    task: str | None = None
    _missing: set[str] = field(default_factory=set, init=False, repr=False)

    takes_parts = True

    def __post_init__(self) -> None:
        if self.task not in (None, *TASKS):
            raise InvalidRequestError(f"task must be {' or '.join(TASKS)}, got {self.task!r}")

    @property
    def model_name(self) -> str:
        """See `Backend`, as for all of these."""
        return self.connection.name

    @property
    def context_size(self) -> int | None:
        """No server says."""
        return None

    def stream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> Generator[Delta, None, None]:
        """Refuse what cannot be sent; then send, as soon as somebody reads."""
        return _Run(self, prompt, tools, options).stream()

    def astream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> AsyncGenerator[Delta, None]:
        """The same on an event loop, of asyncio or trio."""
        return _Run(self, prompt, tools, options).astream()

    def token_ids(self, text: str) -> list[int]:
        """A server does not say its tokens."""
        raise self._uncounted(text)

    def count_tokens(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> int:
        """As `token_ids`."""
        raise self._uncounted((prompt, tools))

    def _uncounted(self, text: object) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self.model_name} runs elsewhere, so nobody here knows the tokens of {text!r:.50};"
            " give custom_get_token_ids, or count by usage_metadata"
        )

    def identity(self) -> dict[str, Any]:
        """Where the model is, and its name there."""
        connection = self.connection
        about = {
            "backend": "remote", "model": connection.name, "url": connection.url,
            "provider": connection.provider, "task": self.task,
        }  # fmt: skip
        for client in (connection.client, connection.async_client):
            if client is not None:
                about["client"] = f"{type(client).__name__} {getattr(client, 'model', None)}"
        return {name: value for name, value in about.items() if value is not None}

    def sibling(self, model: str) -> Remote:
        """Another model of the same server; at another one, if it is a URL."""
        if is_url(model):
            # Nothing that was given for one server goes to another.
            ours = self.connection
            place = make(endpoint_url=model, timeout=ours.timeout, max_retries=ours.max_retries)
            return Remote(place, self.task)
        return Remote(dataclasses.replace(self.connection, model=model), self.task)

    def routes(self, prompt: Prompt) -> list[str]:
        """What to try for a prompt, in order; less what the server is known not to have."""
        if not isinstance(prompt, str) or self.task == "conversational":
            return [CHAT]
        return [route for route in self._text_routes() if route not in self._missing]

    def _text_routes(self) -> list[str]:
        chat = [CHAT] if self.task is None else []
        path = urlsplit(self.connection.url or "").path
        if path.endswith("/chat/completions"):
            return chat or [COMPLETION]
        if path.endswith("/completions") or _VERSION.search(path):
            return [COMPLETION, *chat]
        between = [COMPLETION] if self.connection.url and not self.connection.given else []
        return [GENERATE, *between, *chat]

    def learn(self, missing: Iterable[str]) -> None:
        """Keep in mind what the server turned out not to have, when another route has worked."""
        self._missing.update(missing)


# One request --------------------------------------------------------------------------------------


class _Run:
    """One request: what it asks, and its attempts."""

    def __init__(
        self,
        remote: Remote,
        prompt: Prompt,
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.remote = remote
        self.connection = remote.connection
        self.prompt = prompt
        wishes = {n: v for n, v in options.items() if n not in _OURS and v is not None and v != []}
        self.extra = _extra(options.get("extra_body"))
        self.usage = options.get("stream_usage") is not False
        self.whole = bool(options.get(WHOLE))
        self.clock = Clock(options.get("timeout"))
        retries = options.get("max_retries")
        retries = self.connection.max_retries if retries is None else retries
        self.attempts = Attempts(retries, self.clock)
        self.wishes = wishes
        self.bodies = bodies(remote.routes(prompt), prompt, tools, wishes)
        self.failed: list[str] = []
        self.asked_logprobs = bool(wishes.get("logprobs") or wishes.get("top_logprobs"))

    def stream(self) -> Generator[Delta, None, None]:
        """The deltas of the first route that there is."""
        for route in self.bodies:
            try:
                yield from self._stream(route)
            except (RemoteError, InvalidRequestError) as error:
                if not self._goes_on(route, error):
                    raise
            else:
                self.remote.learn(self.failed)
                return

    async def astream(self) -> AsyncGenerator[Delta, None]:
        """The same on an event loop."""
        for route in self.bodies:
            try:
                async with contextlib.aclosing(self._astream(route)) as deltas:
                    async for delta in deltas:
                        yield delta
            except (RemoteError, InvalidRequestError) as error:
                if not self._goes_on(route, error):
                    raise
            else:
                self.remote.learn(self.failed)
                return

    def _goes_on(self, route: str, error: Exception) -> bool:
        """Whether the next route is to be tried: there is no such path here, or no such task."""
        if self.attempts.begun or route == list(self.bodies)[-1]:
            return False
        if isinstance(error, RemoteError):
            lacks = isinstance(error, RemoteNotFoundError) or error.status in (405, 501)
        else:
            lacks = bool(_NO_TASK.search(str(error)))
        self.failed += [route] * lacks
        return lacks

    def _stream(self, route: str) -> Generator[Delta, None, None]:
        # Prepared once: what cannot be sent at all need not be tried again.
        request = None if self.connection.given else self._request(route)
        while True:
            answer = self._answer()
            try:
                with contextlib.closing(self._events(route, request)) as events:
                    for event in events:
                        for delta in answer.take(event):
                            self.attempts.begun = True
                            yield delta
                yield from answer.end()
                return
            except RemoteError as error:
                time.sleep(self.attempts.pause(error))

    async def _astream(self, route: str) -> AsyncGenerator[Delta, None]:
        request = None
        if self.connection.url:
            request = self._request(route)
        elif not self.connection.given:  # the hub may have to be asked where it is served
            request = await in_thread(lambda: self._request(route))
        while True:
            answer = self._answer()
            try:
                async with contextlib.aclosing(self._aevents(route, request)) as events:
                    async for event in events:
                        for delta in answer.take(event):
                            self.attempts.begun = True
                            yield delta
                for delta in answer.end():
                    yield delta
                return
            except RemoteError as error:
                await asleep(self.attempts.pause(error))

    def _answer(self) -> Answer:
        return Answer(self.connection, self.clock, logprobs=self.asked_logprobs)

    def _events(self, route: str, request: Request | None) -> Generator[Any, None, None]:
        if request is not None:
            yield from self.connection.events(request, self.clock)
            return
        client = self.connection.sync_client()
        with self.connection.hub_errors(), _no_such_task():
            yield from _all(self._use(route)(client))

    async def _aevents(self, route: str, request: Request | None) -> AsyncGenerator[Any, None]:
        if request is not None:
            async with contextlib.aclosing(self.connection.aevents(request, self.clock)) as stream:
                async for event in stream:
                    yield event
        elif self.connection.async_client is not None:
            with self.connection.hub_errors(), _no_such_task():
                said = await self._use(route)(self.connection.async_client)
                async for event in _aall(said):
                    yield event
        else:  # a client that blocks: each of its steps on a thread
            events = self._events(route, None)
            while (event := await in_thread(lambda: next(events, None))) is not None:
                yield event

    # What is sent ---------------------------------------------------------------------------------

    def _request(self, route: str) -> Request:
        body, url = self.bodies[route], self.connection.url
        if route == COMPLETION and url:
            whole = {"model": self.connection.model or UNNAMED, **self._filled(body)}
            return self.connection.request(_at(url, "completions"), whole)
        place = self.connection
        if route == CHAT and url:
            place = dataclasses.replace(place, url=_at(url, "chat/completions"))
        request = place.prepared(self._use(route))
        if route == CHAT:
            # To URLs and to the router our body goes as it is: huggingface_hub would write answer
            # formats otherwise, and leave out what is null, within schemas too.
            exact = url is not None or self.connection.provider in (None, "auto")
            return dataclasses.replace(
                request, body={**request.body, **(self._filled(body) if exact else {})}
            )
        return dataclasses.replace(request, body=self._generated(request.body))

    def _filled(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {**body, **self._streamed(), **self.extra}

    def _streamed(self) -> dict[str, Any]:
        if self.whole:
            return {"stream": False}
        usage = {"stream_options": {"include_usage": True}} if self.usage else {}
        return {"stream": True, **usage}

    def _generated(self, prepared: Mapping[str, Any]) -> dict[str, Any]:
        """A request for text generation: TGI's, or, with other providers, a completion."""
        if "parameters" in prepared:
            return {**prepared, "parameters": {**prepared["parameters"], **self.extra}}
        named = {"model": prepared.get("model"), "prompt": self.prompt}
        return {**named, **completion_fields(self.wishes), **self._streamed(), **self.extra}

    def _use(self, route: str) -> Callable[[Any], Any]:
        """The call of InferenceClient for a route."""
        body = self.bodies[route]
        if route != CHAT:
            if self.extra and self.connection.given:
                raise InvalidRequestError(
                    "extra_body has no place in InferenceClient.text_generation, and the client is"
                    " yours"
                )
            # There a model's name would win over the client's own URL.
            name = None if self.connection.url or self.connection.given else self.connection.model
            return lambda client: client.text_generation(
                self.prompt, details=True, stream=not self.whole, model=name, **body
            )
        rest = self._filled(body)
        streamed = rest.pop("stream")
        named = {name: rest.pop(name) for name in _SIGNATURE if name in rest}
        messages = rest.pop("messages")
        return lambda client: client.chat_completion(
            messages, model=self.connection.model, stream=streamed, extra_body=rest or None, **named
        )


def _at(url: str, tail: str) -> str:
    """Where a server answers such requests: its address, the version of its API, and the path.

    >>> _at("http://localhost:8080", "completions"), _at("http://h/api/v3", "completions")
    ('http://localhost:8080/v1/completions', 'http://h/api/v3/completions')
    """
    parts = urlsplit(url)
    root = _ENDS.sub("", parts.path)
    root = root if _VERSION.search(root) else f"{root}/v1"
    return parts._replace(path=f"{root}/{tail}").geturl()


def _extra(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"extra_body must be a dict, got {type(given).__name__}")
    for name in _RESERVED:
        if name in given:
            raise InvalidRequestError(
                f"extra_body may not hold {name!r}, which is the prompt's own"
            )
    return dict(given)


@contextlib.contextmanager
def _no_such_task() -> Iterator[None]:
    """A ValueError of a user's client, which says what it does not offer, as ours."""
    try:
        yield
    except (RemoteError, InvalidRequestError, json.JSONDecodeError, UnicodeError):
        raise
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"the client refuses the request: {error!s:.300}") from error


def _all(said: Any) -> Any:
    """What a client gave: events, or an answer as a whole."""
    if isinstance(said, str | Mapping) or hasattr(said, "choices"):
        return [said, DONE]
    return said


async def _aall(said: Any) -> AsyncIterator[Any]:
    if hasattr(said, "__aiter__"):
        async for event in said:
            yield event
        return
    for event in _all(said):
        yield event
