"""What a server answers, event by event, as the deltas that a model here gives.

Servers differ: in how they number calls, name ends, and in what they leave out. Whatever a value
is, it is read as what it can be, or left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from .connection import Clock, Connection
from .engine import Delta, TokenLogprob, ToolCall, Usage
from .errors import RemoteResponseError, RemoteStreamError
from .responses import DONE, error_event

UNNAMED = "dummy"
"""What huggingface_hub sends as the model's name to a URL where nobody gave one."""

_REASONS = {
    "eos_token": "stop", "stop_sequence": "stop", "end_turn": "stop", "eos": "stop",
    "max_tokens": "length", "max_new_tokens": "length", "function_call": "tool_calls",
}  # fmt: skip
"""Why an answer ended, in other words than OpenAI's."""


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
