"""A model behind an inference server, as a `Backend`: options -> a request, events -> Delta.

What it speaks: OpenAI's chat and text completions, with the fields that vLLM, SGLang, TGI and
llama.cpp take beside them, and TGI's own text generation. What has no place in a request is
refused, never left out. How a request gets there is `connection`'s business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
import uuid
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

from .connection import (
    DONE,
    Attempts,
    Clock,
    Connection,
    Request,
    asleep,
    error_event,
    in_thread,
    is_url,
    make,
)
from .engine import Delta, Prompt, TokenLogprob, ToolCall, Usage
from .errors import (
    InvalidRequestError,
    RemoteError,
    RemoteNotFoundError,
    RemoteResponseError,
    RemoteStreamError,
)

TASKS = ("text-generation", "conversational")
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
UNNAMED = "dummy"
"""What huggingface_hub sends as the model's name to a URL where nobody gave one."""

_RESERVED = ("messages", "prompt", "inputs", "stream")

_REASONS = {
    "eos_token": "stop", "stop_sequence": "stop", "end_turn": "stop", "eos": "stop",
    "max_tokens": "length", "max_new_tokens": "length", "function_call": "tool_calls",
}  # fmt: skip
"""Why an answer ended, in other words than OpenAI's."""

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
        self.bodies = _bodies(remote.routes(prompt), prompt, tools, wishes)
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


# Options -> fields --------------------------------------------------------------------------------


def _bodies(
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
    with_tools = {"tools": [dict(tool) for tool in tools]} if tools else {}
    return {"messages": messages, **with_tools, **chat_fields(wishes)}


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


# Events -> deltas ---------------------------------------------------------------------------------


class Answer:
    """The events of one answer -> its deltas. The ends are held back until the counts have come."""

    def __init__(self, connection: Connection, clock: Clock, *, logprobs: bool = False) -> None:
        self._connection = connection
        self._clock = clock
        self._logprobs = logprobs
        self._ends: dict[int, str | None] = {}
        self._calls: dict[int, _Calls] = {}
        self._halves: dict[int, str] = {}
        self._usage: Usage | None = None
        self._first: float | None = None
        self._about: dict[str, Any] = {"backend": "remote"}
        self._done = False

    def take(self, event: Any) -> Generator[Delta, None, None]:
        """What one event adds."""
        if event == DONE:
            self._done = True
            return
        error = error_event(event, self._connection.name, self._connection.safe)
        if error is not None:
            raise error
        for delta in self._deltas(event):
            if self._first is None:
                self._first = self._clock.elapsed()
            yield delta

    def end(self) -> Generator[Delta, None, None]:
        """The last deltas. Raises RemoteStreamError where the answer is not at its end."""
        if not self._ends or (not self._done and None in self._ends.values()):
            what = "the stream ended before the answer did" if self._ends else "no answer came"
            raise RemoteStreamError(f"{self._connection.name}: {what}", status=200)
        last = max(self._ends)
        for index in sorted(self._ends):
            called = bool(self._calls.get(index))
            reason = _REASONS.get(self._ends[index] or "", self._ends[index] or "stop")
            yield Delta(
                finish_reason="tool_calls" if called and reason == "stop" else reason,
                usage=self._usage_now() if index == last else None,
                index=index,
                about=self._about,
            )

    def _usage_now(self) -> Usage | None:
        if self._usage is None:
            return None
        return dataclasses.replace(
            self._usage,
            time_to_first_token=self._first or 0.0,
            total_time=self._clock.elapsed(),
        )

    def _deltas(self, event: Any) -> Generator[Delta, None, None]:
        if isinstance(event, list):
            for one in event:
                yield from self._deltas(one)
            return
        if isinstance(event, str):  # a client of the user's may give texts alone
            self._ends.setdefault(0, None)
            yield Delta(event)
            return
        if isinstance(event, int | float) or event is None:
            raise RemoteResponseError(
                f"{self._connection.name}: expected an answer, got {event!r:.50}", status=200
            )
        self._note(event)
        choices = _get(event, "choices")
        if isinstance(choices, list):
            for position, choice in enumerate(choices):
                yield from self._choice(choice, position)
        elif _get(event, "token") is not None:
            yield from self._token(event)
        elif isinstance(_get(event, "generated_text"), str):
            yield from self._generated(event)

    def _note(self, event: Any) -> None:
        """What an event says of the answer as a whole."""
        model = _get(event, "model")
        if isinstance(model, str) and model and model != UNNAMED:
            self._about["model_name"] = model
        fingerprint = _get(event, "system_fingerprint")
        if isinstance(fingerprint, str) and fingerprint:
            self._about["system_fingerprint"] = fingerprint
        self._usage = _usage(_get(event, "usage")) or self._usage

    def _choice(self, choice: Any, position: int) -> Generator[Delta, None, None]:
        index = _get(choice, "index")
        index = index if isinstance(index, int) else position
        self._ends.setdefault(index, None)
        said = _get(choice, "delta") or _get(choice, "message")
        whole = _get(choice, "message") is not None
        texts = (_get(said, "content"), _get(said, "refusal"), _get(choice, "text"))
        text = self._paired("".join(map(_text, texts)), index)
        reasoning = _text(_get(said, "reasoning_content")) or _text(_get(said, "reasoning"))
        calls = self._calls.setdefault(index, _Calls()).take(_get(said, "tool_calls"), whole)
        logprobs = _logprobs(_get(choice, "logprobs"))
        if text or reasoning or calls or logprobs:
            yield Delta(
                text, (), logprobs, reasoning=reasoning, tool_calls=tuple(calls), index=index
            )
        reason = _get(choice, "finish_reason")
        if isinstance(reason, str) and reason:
            self._ends[index] = reason

    def _paired(self, text: str, index: int) -> str:
        """Text whose surrogates are pairs: servers that count in UTF-16 may cut between two."""
        text = self._halves.pop(index, "") + text
        try:
            text.encode()
        except UnicodeEncodeError:
            if "\ud800" <= text[-1] <= "\udbff":
                text, self._halves[index] = text[:-1], text[-1]
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _token(self, event: Any) -> Generator[Delta, None, None]:
        """TGI's event: a token, and with the last one the details."""
        token = _get(event, "token")
        self._ends.setdefault(0, None)
        if not _get(token, "special"):
            yield Delta(_text(_get(token, "text")), _ids(token), self._of_token(token, event))
        if isinstance(_get(event, "generated_text"), str) or _get(event, "details"):
            self._detailed(_get(event, "details"))

    def _of_token(self, token: Any, event: Any) -> tuple[TokenLogprob, ...] | None:
        logprob = _get(token, "logprob")
        if not self._logprobs or not isinstance(logprob, int | float):
            return None
        top = tuple(
            (_id(t), _text(_get(t, "text")), _number(_get(t, "logprob")))
            for t in _list(_get(event, "top_tokens"))
        )
        return (TokenLogprob(_text(_get(token, "text")), _id(token), _number(logprob), top),)

    def _generated(self, event: Any) -> Generator[Delta, None, None]:
        """A text that came whole, as servers without streams send it."""
        self._ends.setdefault(0, None)
        details = _get(event, "details")
        tokens = _get(details, "tokens") if self._logprobs else None
        logprobs = tuple(
            TokenLogprob(_text(_get(token, "text")), _id(token), _number(_get(token, "logprob")))
            for token in _list(tokens)
        )
        yield Delta(_get(event, "generated_text"), logprobs=logprobs or None)
        self._detailed(details)

    def _detailed(self, details: Any) -> None:
        reason = _get(details, "finish_reason")
        self._ends[0] = reason if isinstance(reason, str) else "stop"
        made, read = _get(details, "generated_tokens"), _get(details, "input_length")
        if isinstance(made, int) and isinstance(read, int):
            self._usage = Usage(read, made)


class _Calls:
    """The calls of one answer so far, by what servers take to tell them."""

    def __init__(self) -> None:
        self._made: list[dict[str, Any]] = []
        self._places: dict[Any, int] = {}

    def __bool__(self) -> bool:
        return bool(self._made)

    def take(self, pieces: Any, whole: bool) -> list[ToolCall]:
        """Pieces as a server sends them -> pieces as `Delta` has them."""
        pieces = pieces if isinstance(pieces, list | tuple) else [pieces] if pieces else []
        return [self._piece(piece, at if whole else None) for at, piece in enumerate(pieces)]

    def _piece(self, piece: Any, position: int | None) -> ToolCall:
        function = _get(piece, "function")
        name, arguments = _get(function, "name"), _get(function, "arguments")
        arguments = "" if arguments is None else arguments
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        place, new = self._place(piece, position, name)
        call = self._made[place]
        told, call["name"] = call["name"], call["name"] or name
        return ToolCall(
            index=place,
            id=call["id"] if new else None,
            name=None if told else (name or None),
            arguments=arguments,
        )

    def _place(self, piece: Any, position: int | None, name: Any) -> tuple[int, bool]:
        """Which call a piece is of, and whether it is its first."""
        index, call_id = _get(piece, "index"), _get(piece, "id") or None
        key = index if isinstance(index, int) else position
        known = self._places.get(key) if key is not None else self._unnumbered(call_id)
        if known is not None:
            # Some servers number all calls 0: a new id with a new name is a new call.
            other = call_id is not None and name and call_id != self._made[known]["given"]
            if not other:
                return known, False
        made = {"id": call_id or f"call_{uuid.uuid4().hex[:24]}", "given": call_id, "name": None}
        self._made.append(made)
        self._places[key] = len(self._made) - 1
        return len(self._made) - 1, True

    def _unnumbered(self, call_id: Any) -> int | None:
        """Without a number a piece goes on with the last call, unless its id is new."""
        if not self._made:
            return None
        last = len(self._made) - 1
        return last if call_id in (None, self._made[last]["given"]) else None


def _get(source: Any, name: str) -> Any:
    """A field of a dict, or of an object of huggingface_hub's."""
    if type(source) is dict:
        return source.get(name)
    return None if source is None else getattr(source, name, None)


def _text(value: Any) -> str:
    """Text, or the texts of content parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(_get(part, "text")) for part in value)
    return ""


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _id(token: Any) -> int | None:
    number = _get(token, "id")
    return number if isinstance(number, int) else None


def _ids(token: Any) -> tuple[int, ...]:
    number = _id(token)
    return () if number is None else (number,)


def _usage(counts: Any) -> Usage | None:
    read, made = _get(counts, "prompt_tokens"), _get(counts, "completion_tokens")
    if not isinstance(read, int):
        return None
    thought = _get(_get(counts, "completion_tokens_details"), "reasoning_tokens")
    return Usage(
        read,
        made if isinstance(made, int) else 0,
        reasoning_tokens=thought if isinstance(thought, int) else None,
    )


def _logprobs(given: Any) -> tuple[TokenLogprob, ...] | None:
    """Log probabilities of a chat, or of a text completion."""
    content = _get(given, "content")
    if isinstance(content, list):
        return tuple(map(_logprob, content)) or None
    tokens, values = _get(given, "tokens"), _get(given, "token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list):
        return None
    tops = _list(_get(given, "top_logprobs")) or [None] * len(tokens)
    return tuple(
        TokenLogprob(str(token), None, _number(value), _top_of_dict(top))
        for token, value, top in zip(tokens, values, tops, strict=False)
    )


def _logprob(entry: Any) -> TokenLogprob:
    top = tuple(
        (None, _text(_get(one, "token")), _number(_get(one, "logprob")))
        for one in _list(_get(entry, "top_logprobs"))
    )
    return TokenLogprob(_text(_get(entry, "token")), None, _number(_get(entry, "logprob")), top)


def _top_of_dict(top: Any) -> tuple[tuple[int | None, str, float], ...]:
    named = top if isinstance(top, Mapping) else {}
    return tuple((None, str(token), _number(value)) for token, value in named.items())


def _number(value: Any) -> float:
    """A log probability; what the server left out is not known, not 0."""
    with contextlib.suppress(OverflowError):
        return float(value) if isinstance(value, int | float) else float("nan")
    return float("nan")
