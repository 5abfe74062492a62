"""The way to an inference server: where a request goes, who may see the token, what may come back.

huggingface_hub's InferenceClient says where and in what form a request is sent (providers, routes,
headers). What carries it is here, because its own transport follows a redirect with prompt and all,
gives the saved token to any URL, refuses 127.0.0.1 while offline, takes a stream that broke off for
one that ended, and cuts lines where JSON has none. A client that the user made is used as it is.

Its limit: time is looked at between reads, so a server that sends its headers byte by byte can keep
a request for as long as it likes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import SecretStr

from . import hub, options
from .errors import (
    InvalidRequestError,
    RemoteAuthenticationError,
    RemoteConnectionError,
    RemoteError,
    RemoteRateLimitError,
    RemoteResponseError,
    RemoteServerError,
    RemoteStreamError,
    RemoteTimeoutError,
    UnsupportedModelError,
)
from .responses import DONE, Reading, failure
from .urls import (
    SECRET,
    checked_url,
    is_hugging_face,
    is_loopback,
    is_url,
    open_headers,
    saved_token,
    shown,
    split,
)

T = TypeVar("T")

SILENCE = 120.0
"""Seconds that a server may be silent, where nobody says."""

LONGEST_WAIT = 60.0
"""Seconds that a Retry-After may ask for; who wants more gets an error at once."""

_SERVER = ("cookies",)
"""What `server_kwargs` may hold beside arguments that have names of their own here."""


@dataclass(frozen=True)
class Request:
    """One POST: its URL, its headers, its JSON."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: Any = field(repr=False)


@dataclass(frozen=True, eq=False)
class Connection:
    """A server, and how it is asked.

    `model`: a repository, or at a `url` the name that goes on the wire. `token`: given for this
    server, and sent to it wherever it is; without one, that of the environment or of the saved
    login goes to Hugging Face's own hosts alone. `timeout`: seconds of silence. `client` and
    `async_client`: the user's own, used instead of all that.

    A pickle holds neither token nor headers that look like one.
    """

    model: str | None = None
    url: str | None = None
    provider: str | None = None
    token: SecretStr | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    bill_to: str | None = None
    cookies: Mapping[str, str] | None = field(default=None, repr=False)
    timeout: float = SILENCE
    max_retries: int = 2
    client: Any = field(default=None, repr=False)
    async_client: Any = field(default=None, repr=False)

    def __copy__(self) -> Connection:
        return self

    def __deepcopy__(self, memo: object) -> Connection:
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.given:
            raise InvalidRequestError("a client of the user's cannot be pickled; it holds a token")
        kept = {name: value for name, value in vars(self).items() if name in _FIELDS}
        return {**kept, "token": None, "cookies": None, "headers": open_headers(self.headers)}

    @property
    def name(self) -> str:
        """The model as its user calls it: its name, else where it is."""
        return self.model or (shown(self.url) if self.url else "") or "endpoint"

    @property
    def given(self) -> bool:
        """Whether a client of the user's does the work."""
        return self.client is not None or self.async_client is not None

    # Where a request goes ------------------------------------------------------------------------

    def prepared(self, use: Callable[[Any], Any]) -> Request:
        """What a call of InferenceClient would send. May ask the hub for a provider's name of it.

        Raises InvalidRequestError for what the provider does not offer.
        """
        self.check_reach()
        with self.hub_errors():
            try:
                use(self._hub_client(_caught))
            except _Caught as caught:
                wanted = caught.parameters
                return self.request(wanted.url, wanted.json, wanted.headers)
            except (ValueError, StopIteration) as error:  # the latter: no provider at all
                words = str(error) or f"no provider serves {self.name}"
                raise InvalidRequestError(self.safe(words)) from error
        raise UnsupportedModelError("this call of huggingface_hub sends nothing", what="call")

    def request(self, url: str, body: Any, headers: Mapping[str, str] | None = None) -> Request:
        """A request of ours to a URL of this server."""
        own = {name.lower(): value for name, value in self.headers.items()}
        sent = {
            "content-type": "application/json",
            **(headers or {}),
            "accept-encoding": "identity",
        }
        sent.pop("authorization", None)
        secret = self._secret(url)
        if secret is not None:
            sent["authorization"] = f"Bearer {secret}"
        if self.cookies:
            sent["cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if self.bill_to is not None:
            sent["x-hf-bill-to"] = self.bill_to
        return Request(url, {**sent, **own}, body)

    def _secret(self, url: str) -> str | None:
        """The token that this URL may see."""
        if self.token is not None:
            return self.token.get_secret_value()
        return saved_token() if is_hugging_face(url) else None

    def check_reach(self) -> None:
        """Refuse what cannot end well: the hub while offline, a repository without a token."""
        if (self.url is None or is_hugging_face(self.url)) and hub.offline():
            raise RemoteConnectionError(
                f"{self.name} is at Hugging Face, and HF_HUB_OFFLINE says not to go there"
            )
        if self.url is None and self.token is None and saved_token() is None:
            raise RemoteAuthenticationError(
                f"no token for {self.name}: give huggingfacehub_api_token, set HF_TOKEN,"
                " or log in with `hf auth login`"
            )

    def _hub_client(self, post: Callable[..., Any]) -> Any:
        """An InferenceClient that knows this server, and hands what it would send to `post`."""
        from huggingface_hub import InferenceClient

        token = self.token.get_secret_value() if self.token else None
        if token is None and self.url is None:
            token = saved_token()
        client = InferenceClient(
            model=self.url or self.model,
            provider=self.provider,  # type: ignore[arg-type]  # it is checked there
            token=token,
            headers=dict(self.headers),
        )
        if not callable(getattr(client, "_inner_post", None)):
            raise UnsupportedModelError(
                "this huggingface_hub sends in a way that is not known here; give client=",
                what="library",
                name="huggingface_hub",
            )
        setattr(client, "_inner_post", post)  # noqa: B010  # of the instance, not of the class
        return client

    # One request ----------------------------------------------------------------------------------

    def events(self, request: Request, clock: Clock) -> Iterator[Any]:
        """The answer's JSON values: of each event and then DONE, or the one that it is."""
        httpx = _library()

        with (
            self._errors(clock),
            httpx.Client(**_transport(request.url)) as http,
            http.stream(**self._posted(request, clock)) as response,
        ):
            if not response.is_success:
                self._refused(response, _first(response.iter_bytes(), clock))
            reading = Reading(response.headers.get("content-type", ""), request.url)
            with self._stream_errors(clock):
                for chunk in response.iter_bytes():
                    yield from reading.feed(chunk)
                    if reading.done:
                        return
                    clock.check()
                yield from reading.end()

    async def aevents(self, request: Request, clock: Clock) -> AsyncGenerator[Any, None]:
        """The same on an event loop."""
        httpx = _library()

        with self._errors(clock):
            async with (
                httpx.AsyncClient(**_transport(request.url)) as http,
                http.stream(**self._posted(request, clock)) as response,
            ):
                if not response.is_success:
                    self._refused(response, await _afirst(_chunks(response), clock))
                reading = Reading(response.headers.get("content-type", ""), request.url)
                with self._stream_errors(clock):
                    async with contextlib.aclosing(_chunks(response)) as chunks:
                        async for chunk in chunks:
                            for value in reading.feed(chunk):
                                yield value
                            if reading.done:
                                await _drained(chunks)
                                return
                            clock.check()
                    for value in reading.end():
                        yield value

    def _posted(self, request: Request, clock: Clock) -> dict[str, Any]:
        try:
            body = json.dumps(request.body, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError) as error:  # NaN, an object, half of a surrogate pair
            raise InvalidRequestError(f"the request cannot be written as JSON: {error}") from error
        return {
            "method": "POST",
            "url": request.url,
            "content": body,
            "headers": dict(request.headers),
            "timeout": clock.patience(self.timeout),
        }

    def _refused(self, response: Any, body: bytes) -> None:
        raise failure(response.status_code, response.headers, body, str(response.url), self.safe)

    def safe(self, text: str) -> str:
        """A text without this server's secrets: some servers say back what they were sent."""
        hidden = [value for name, value in self.headers.items() if SECRET.search(name)]
        hidden += (self.cookies or {}).values()
        known = [self.token.get_secret_value() if self.token else None, saved_token(), *hidden]
        for secret in known:
            bare = (secret or "").removeprefix("Bearer ")
            text = text.replace(bare, "***") if len(bare) > 3 else text
        return text

    # Whole answers --------------------------------------------------------------------------------

    def call(self, use: Callable[[Any], T]) -> T:
        """The result of a call of InferenceClient: `connection.call(lambda c: c.model_info())`.

        `use` gets the user's client, or one that is carried as said above, with retries.
        """
        if self.given:
            return self._retried(lambda _: self._of_given(use))
        request = self.prepared(use)
        data = self._retried(lambda clock: self._whole(request, clock))
        return self._decoded(use, data)

    async def acall(self, use: Callable[[Any], Any]) -> Any:
        """The same on an event loop; `use` gets the user's async client, if there is one."""
        if self.async_client is not None:

            async def attempt(_: Clock) -> Any:
                with self.hub_errors():
                    return await use(self.async_client)

            return await self._aretried(attempt)
        if self.given:
            return await in_thread(lambda: self.call(use))
        request = await in_thread(lambda: self.prepared(use))
        data = await self._aretried(lambda clock: self._awhole(request, clock))
        return self._decoded(use, data)

    def post_json(self, url: str, body: Any) -> Any:
        """The JSON that a POST to a URL of this server gives."""
        self.check_reach()
        request = self.request(url, body)
        return self._retried(lambda clock: self._whole(request, clock))

    async def apost_json(self, url: str, body: Any) -> Any:
        """The same on an event loop."""
        self.check_reach()
        request = self.request(url, body)
        return await self._aretried(lambda clock: self._awhole(request, clock))

    def _of_given(self, use: Callable[[Any], T]) -> T:
        with self.hub_errors():
            return use(self.sync_client())

    def sync_client(self) -> Any:
        """The user's client. Raises InvalidRequestError where only an async one was given."""
        if self.client is None:
            raise InvalidRequestError(
                "only async_client was given; calls without await need client"
            )
        return self.client

    def _decoded(self, use: Callable[[Any], T], data: Any) -> T:
        """What InferenceClient makes of an answer."""

        def answered(*_: Any, **__: Any) -> bytes:
            return json.dumps(data).encode()

        with self.hub_errors():
            try:
                return use(self._hub_client(answered))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise RemoteResponseError(
                    f"{self.name}: the answer is not of the expected form: {error!s:.200}"
                ) from error

    def _whole(self, request: Request, clock: Clock) -> Any:
        return _only(list(self.events(request, clock)), request.url)

    async def _awhole(self, request: Request, clock: Clock) -> Any:
        return _only([value async for value in self.aevents(request, clock)], request.url)

    def _retried(self, attempt: Callable[[Clock], T]) -> T:
        attempts = Attempts(self.max_retries, Clock())
        while True:
            try:
                return attempt(attempts.clock)
            except RemoteError as error:
                time.sleep(attempts.pause(error))

    async def _aretried(self, attempt: Callable[[Clock], Any]) -> Any:
        attempts = Attempts(self.max_retries, Clock())
        while True:
            try:
                return await attempt(attempts.clock)
            except RemoteError as error:
                await asleep(attempts.pause(error))

    # What goes wrong ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _errors(self, clock: Clock) -> Iterator[None]:
        """The transport's errors as ours, before an answer began."""
        httpx = _library()

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise RemoteConnectionError(f"{self.name}: no connection: {_reason(error)}") from error
        except httpx.TimeoutException as error:
            raise clock.silent(self.name, self.timeout) from error
        except httpx.HTTPError as error:
            raise RemoteConnectionError(
                f"{self.name}: gone before it answered: {_reason(error)}"
            ) from error
        except (httpx.InvalidURL, UnicodeEncodeError) as error:  # the latter: in a header
            raise InvalidRequestError(self.safe(f"this cannot be sent: {error}")) from error

    @contextlib.contextmanager
    def _stream_errors(self, clock: Clock) -> Iterator[None]:
        """The same while an answer comes."""
        httpx = _library()

        try:
            yield
        except httpx.TimeoutException as error:
            raise clock.silent(self.name, self.timeout) from error
        except httpx.HTTPError as error:
            raise RemoteStreamError(
                f"{self.name}: the answer broke off: {_reason(error)}"
            ) from error

    @contextlib.contextmanager
    def hub_errors(self) -> Iterator[None]:
        """What huggingface_hub raises, of its own requests and of a user's client, as ours."""
        from huggingface_hub import errors

        httpx = _library()

        try:
            yield
        except RemoteError:
            raise
        except errors.HfHubHTTPError as error:
            response = error.response
            words = str(getattr(error, "server_message", None) or "").encode() or _read(response)
            raise failure(
                response.status_code, response.headers, words, str(response.url), self.safe
            ) from error
        except (errors.InferenceTimeoutError, httpx.TimeoutException) as error:
            raise RemoteTimeoutError(f"{self.name}: no answer in time") from error
        except errors.OfflineModeIsEnabled as error:
            raise RemoteConnectionError(f"{self.name}: HF_HUB_OFFLINE is set") from error
        except httpx.HTTPError as error:
            raise RemoteConnectionError(f"{self.name}: {_reason(error)}") from error
        except errors.TextGenerationError as error:
            said = self.safe(str(error))
            raise RemoteServerError(f"{self.name}: {said}", server_message=said) from error
        except json.JSONDecodeError as error:
            raise RemoteResponseError(f"{self.name}: no JSON in the answer: {error}") from error


_FIELDS = tuple(f.name for f in dataclasses.fields(Connection))


def make(
    *,
    endpoint_url: str | None = None,
    repo_id: str | None = None,
    model: str | None = None,
    provider: str | None = None,
    token: SecretStr | str | None = None,
    headers: Mapping[str, str] | None = None,
    bill_to: str | None = None,
    timeout: float | None = None,
    max_retries: int | None = None,
    server_kwargs: Mapping[str, Any] | None = None,
    client: Any = None,
    async_client: Any = None,
) -> Connection:
    """A connection of LangChain's arguments: a URL, or a repository, or a client of the user's.

    `model` is a URL or a repository too; beside an endpoint_url it is the model's name there.
    `server_kwargs`: the same arguments, and cookies. HF_INFERENCE_ENDPOINT is the URL where nothing
    else is given. Raises InvalidRequestError for none or several of them.

    >>> make(endpoint_url="http://127.0.0.1:8080/v1", model="tiny").name
    'tiny'
    """
    more = _server_arguments(server_kwargs or {})
    url, name = _place(endpoint_url, repo_id, model, named=client or async_client)
    if url is not None and provider is not None:
        raise InvalidRequestError(f"provider={provider!r} is of repositories; a URL has none")
    secret = more.get("token", token)
    if secret is not None and not isinstance(secret, SecretStr):
        secret = SecretStr(checked_token(secret))
    return Connection(
        model=name,
        url=url,
        provider=more.get("provider", provider),
        token=secret,
        headers=_checked_headers({**(headers or {}), **(more.get("headers") or {})}),
        bill_to=more.get("bill_to", bill_to),
        cookies=more.get("cookies"),
        timeout=_positive("timeout", more.get("timeout", timeout), SILENCE),
        max_retries=2 if max_retries is None else max_retries,
        client=client,
        async_client=async_client,
    )


def checked_token(token: object) -> str:
    """A token that is text. What else came is not shown: it may hold one."""
    if not isinstance(token, str):
        raise InvalidRequestError(f"a token must be a str, got {type(token).__name__}")
    return token


def _server_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    known = ("token", "headers", "bill_to", "timeout", "provider", *_SERVER)
    named = {"token" if name == "api_key" else name: value for name, value in given.items()}
    for name in named:
        if name not in known:
            raise options.unknown(name, known)
    return {name: value for name, value in named.items() if value is not None}


def _place(
    endpoint_url: str | None, repo_id: str | None, model: str | None, *, named: Any
) -> tuple[str | None, str | None]:
    """The URL and the model's name out of all that may say them."""
    if endpoint_url is None and repo_id is None and is_url(model):
        endpoint_url, model = model, None
    if repo_id is not None and is_url(repo_id):
        raise InvalidRequestError(f"repo_id must be owner/name, got {shown(repo_id)!r}")
    if repo_id is not None and endpoint_url is not None:
        raise InvalidRequestError("give endpoint_url or repo_id, not both")
    if repo_id is not None and model not in (None, repo_id):
        raise InvalidRequestError(f"repo_id={repo_id!r} and model={model!r} differ; give one")
    name = repo_id or model
    if endpoint_url is None and name is None and not named:
        endpoint_url = os.environ.get("HF_INFERENCE_ENDPOINT") or None
        if endpoint_url is None:
            raise InvalidRequestError("endpoint_url, repo_id or model is needed, got none of them")
    return (None if endpoint_url is None else checked_url(endpoint_url)), name


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            kinds = f"{type(name).__name__} and {type(value).__name__}"
            raise InvalidRequestError(f"headers must be str and str, got {kinds}")
        if re.search(r"[\r\n\0]", name + value):
            raise InvalidRequestError(f"header {name!r:.50} must be one line, got several")
    return dict(headers)


def _positive(name: str, value: Any, otherwise: float) -> float:
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidRequestError(f"{name} must be seconds, more than 0, got {value!r:.50}")
    return float(value)


# Time ---------------------------------------------------------------------------------------------


class Clock:
    """When a request began, and what is left of its `timeout` (None: no end)."""

    def __init__(self, timeout: float | None = None) -> None:
        if timeout is not None:
            _positive("timeout", timeout, 0.0)
        self.timeout = timeout
        self.began = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.began

    def left(self) -> float:
        """Seconds until it must be over."""
        return float("inf") if self.timeout is None else self.timeout - self.elapsed()

    def check(self) -> None:
        """Raise RemoteTimeoutError when the time is up."""
        if self.left() <= 0:
            raise RemoteTimeoutError(
                f"the request took longer than its timeout of {self.timeout} s",
                timeout=self.timeout or 0.0,
            )

    def patience(self, silence: float) -> float:
        """How long to wait for a byte."""
        self.check()
        return min(silence, self.left())

    def silent(self, name: str, silence: float) -> RemoteTimeoutError:
        """The error for who said nothing for too long."""
        if self.timeout is not None and self.timeout < silence:
            return RemoteTimeoutError(
                f"{name}: no answer within the request's timeout of {self.timeout} s",
                timeout=self.timeout,
            )
        return RemoteTimeoutError(f"{name} was silent for {silence} s", timeout=silence)


@dataclass
class Attempts:
    """How often a request may still be tried, and when."""

    retries: int
    clock: Clock
    made: int = 0
    begun: bool = False
    """Whether something of the answer has been handed on; then nothing is tried again."""

    def pause(self, error: RemoteError) -> float:
        """Seconds to wait before the next attempt; raises the error when there is to be none."""
        if self.begun or self.made >= self.retries or not _may_pass(error):
            raise error
        self.made += 1
        wait = min(0.5 * 2.0 ** (self.made - 1), 8.0)
        wait *= 0.75 + time.monotonic_ns() % 1000 / 4000  # so that many do not come back as one
        if error.retry_after is not None:
            wait = error.retry_after
        if wait > LONGEST_WAIT or wait >= self.clock.left():
            raise error
        return wait


def _may_pass(error: RemoteError) -> bool:
    """Whether a later attempt may do."""
    if isinstance(error, RemoteServerError):
        return error.status != 501
    return isinstance(error, RemoteRateLimitError | RemoteConnectionError | RemoteStreamError)


async def asleep(seconds: float) -> None:
    """Sleep on whatever event loop runs."""
    import anyio

    await anyio.sleep(seconds)


async def in_thread(work: Callable[[], T]) -> T:
    """Run what blocks without blocking the event loop."""
    import anyio.to_thread

    return await anyio.to_thread.run_sync(work)


# The way itself ----------------------------------------------------------------------------------


class _Caught(Exception):  # noqa: N818  # it is a message, not an error
    """What InferenceClient was about to send."""

    def __init__(self, parameters: Any) -> None:
        super().__init__("caught")
        self.parameters = parameters


def _caught(parameters: Any, **_: Any) -> Any:
    raise _Caught(parameters)


def _transport(url: str) -> dict[str, Any]:
    """How to reach a URL: never another one, and this machine without a proxy."""
    parts = split(url)
    verify: Any = _certificates() if parts.scheme == "https" else False
    return {
        "verify": verify,
        "follow_redirects": False,
        "trust_env": not is_loopback(parts.hostname or ""),
    }


def _library() -> Any:
    """The HTTP library that huggingface_hub uses: httpx; from its version 2 on another."""
    from huggingface_hub import utils

    return getattr(utils, "httpx", None) or importlib.import_module("httpx")


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than many an answer."""
    context: ssl.SSLContext = _library().create_ssl_context()
    return context


def _only(values: list[Any], url: str) -> Any:
    found = [value for value in values if value != DONE]
    if len(found) != 1:
        raise RemoteResponseError(f"{shown(url)}: expected one answer, got {len(found)}")
    return found[0]


_MOST_WORDS, _MOST_SECONDS = 1 << 16, 5.0
"""How much of an error is read, and for how long."""


def _first(chunks: Iterator[bytes], clock: Clock) -> bytes:
    """As much of an error as anybody would read."""
    data, until = b"", clock.elapsed() + min(_MOST_SECONDS, clock.left())
    for chunk in chunks:
        data += chunk
        if len(data) >= _MOST_WORDS or clock.elapsed() > until:
            break
    return data[:_MOST_WORDS]


async def _afirst(chunks: AsyncGenerator[bytes, None], clock: Clock) -> bytes:
    data, until = b"", clock.elapsed() + min(_MOST_SECONDS, clock.left())
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            data += chunk
            if len(data) >= _MOST_WORDS or clock.elapsed() > until:
                break
    return data[:_MOST_WORDS]


async def _drained(chunks: AsyncGenerator[bytes, None], patience: float = 0.2) -> None:
    """Read to the end, which is at hand: trio minds generators that were left before theirs."""
    import anyio

    with anyio.move_on_after(patience):
        async for _ in chunks:
            pass


def _chunks(response: Any) -> AsyncGenerator[bytes, None]:
    """The bytes of an answer as they come; a generator that can be closed, as trio wants it."""
    # `aiter_bytes` has a second one in it, which nobody closes.
    encoded = response.headers.get("content-encoding", "identity") != "identity"
    chunks: AsyncGenerator[bytes, None] = (
        response.aiter_bytes() if encoded else response.aiter_raw()
    )
    return chunks


def _read(response: Any) -> bytes:
    """The body of a response, if it was read."""
    try:
        return bytes(response.content)
    except Exception:  # what an unread response raises is the HTTP library's own
        return b""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
