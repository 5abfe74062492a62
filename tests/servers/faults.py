"""What goes wrong with servers, as steps of a script: `Recording(*[unavailable()] * 2)`.

Each is made by a function here, answers one request, and is over: the next goes by the script
again. Whoever stalls gives up when the client leaves or the server closes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from .loopback import EVENTS, Exchange
from .recording import CREATED, Action, error_body, split

TEXT = "Grüße, 世界 🎉 e\u0301!"
"""Characters of one to four bytes, and one of two."""


def status(code: int, words: str, headers: Mapping[str, str] = {}, body: Any = None) -> Action:
    """An error in OpenAI's form, or with that body; a str is sent as it is."""

    def act(exchange: Exchange) -> None:
        head = {"X-Request-Id": f"fault-{code}", **headers}
        if isinstance(body, str):
            return exchange.reply(code, body.encode(), "text/plain; charset=utf-8", head)
        return exchange.reply_json(code, error_body(words, code) if body is None else body, head)

    return act


def too_many(retry_after: str | None = "0") -> Action:
    """429, saying when to come again."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return status(429, "Rate limit reached. Please wait.", headers)


def unavailable() -> Action:
    """503, as a model that is still loading."""
    return status(503, "Model is loading", body={"error": "Model is loading", "estimated_time": 1})


def broken(code: int = 500) -> Action:
    """500, 502, 504."""
    return status(code, "Something went wrong inside.")


def unauthorised() -> Action:
    """401."""
    return status(401, "Invalid username or password.")


def gated() -> Action:
    """403 of a model whose terms have to be accepted, with the hub's headers."""
    words = "Access to model owner/gated is restricted and you are not in the authorized list."
    headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": words}
    return status(403, words, headers)


def missing() -> Action:
    """404."""
    return status(404, "The model `owner/none` does not exist.")


def invalid() -> Action:
    """422 in the form of FastAPI."""
    detail = [{"loc": ["body", "top_k"], "msg": "extra fields not permitted", "type": "extra"}]
    return status(422, "", body={"detail": detail})


def plain(code: int, text: str) -> Action:
    """An error that is not JSON: a proxy's page."""
    return status(code, "", body=text)


# Connections ------------------------------------------------------------------------------------


def reset() -> Action:
    """Broken before anything was said."""
    return lambda exchange: exchange.reset()


def closed() -> Action:
    """Closed before anything was said."""
    return lambda exchange: exchange.hang_up()


def silent(seconds: float = 60) -> Action:
    """Nothing is said at all."""
    return lambda exchange: exchange.wait(seconds)


def cut_body() -> Action:
    """A whole answer that ends before its Content-Length."""

    def act(exchange: Exchange) -> None:
        exchange.reply(200, b'{"id": "x", "choi', headers={"Content-Length": "5000"})
        exchange.hang_up()

    return act


def streamed(*steps: Any, text: str = "Hello there, you", after: int = 2) -> Action:
    """A chat's stream of so many pieces of the text, and then the steps: functions of the exchange.

    Steps that are bytes are sent as they are, as a chunk.
    """

    def act(exchange: Exchange) -> None:
        exchange.begin(headers={"X-Request-Id": "fault-stream"})
        for data in events(split(text)[:after], whole=False):
            exchange.piece(data)
        for step in steps:
            exchange.piece(step) if isinstance(step, bytes) else step(exchange)

    return act


def reset_mid_stream(after: int = 2) -> Action:
    """Broken when so many pieces of text have come."""
    return streamed(broken_off, after=after)


def closed_mid_stream(after: int = 2) -> Action:
    """Closed in the midst, without the last chunk."""
    return streamed(lambda exchange: exchange.hang_up(), after=after)


def ended_early(after: int = 2) -> Action:
    """Ended as HTTP has it, but without finish_reason and [DONE]."""
    return streamed(lambda exchange: exchange.end(), after=after)


def stalled(after: int = 2, seconds: float = 60) -> Action:
    """Some pieces, then silence."""
    return streamed(lambda exchange: exchange.wait(seconds), after=after)


def trickled(after: int = 2, every: float = 0.05, seconds: float = 60) -> Action:
    """Some pieces, then comments that keep the connection alive, and nothing else."""

    def act(exchange: Exchange) -> None:
        for _ in range(int(seconds / every)):
            exchange.piece(b": still here\n\n")
            exchange.wait(every)

    return streamed(act, after=after)


def trickled_error(code: int = 500, every: float = 0.05, seconds: float = 60) -> Action:
    """An error whose words come one by one, and do not end."""

    def act(exchange: Exchange) -> None:
        exchange.begin(code, "application/json")
        for _ in range(int(seconds / every)):
            exchange.piece(b" ")
            exchange.wait(every)

    return act


# Content ----------------------------------------------------------------------------------------


def bytewise(text: str = TEXT, size: int = 1) -> Action:
    """A sound stream in chunks of so many bytes: edges within characters and within lines."""

    def act(exchange: Exchange) -> None:
        data = b"".join(events(split(text)))
        exchange.begin()
        for start in range(0, len(data), size):
            exchange.piece(data[start : start + size])
        exchange.end()

    return act


def written_otherwise(text: str = TEXT) -> Action:
    """A sound stream as the standard allows it too: CRLF, comments, no space, other fields."""

    def act(exchange: Exchange) -> None:
        exchange.begin(kind=f"{EVENTS}; charset=utf-8")
        exchange.piece(b": hello\r\n\r\nretry: 10\r\n\r\n")
        for number, data in enumerate(events(split(text))):
            line = data.strip().removeprefix(b"data: ")
            exchange.piece(b"event: message\r\nid: %d\r\ndata:%s\r\n\r\n" % (number, line))
        exchange.end()

    return act


def malformed(line: bytes = b'data: {"choices": [{"ind\n\n') -> Action:
    """A stream with a line that is no event of a chat."""
    return streamed(line, lambda exchange: exchange.end())


def error_event(words: str = "CUDA out of memory") -> Action:
    """An error within a stream that began well."""
    event = {"error": {"message": words, "type": "server_error", "code": 500}}
    return streamed(f"data: {json.dumps(event)}\n\n".encode(), lambda exchange: exchange.end())


def long_line(size: int = 10_000_000, *, ends: bool = True) -> Action:
    """A stream with a line of that many bytes, which ends or does not."""

    def act(exchange: Exchange) -> None:
        exchange.begin()
        head, tail = b"".join(events(["@"])).split(b"@")
        exchange.piece(head)
        for _ in range(size // 100_000):
            exchange.piece(b"x" * 100_000)
        if ends:
            exchange.piece(tail)
        exchange.end()

    return act


def many_lines(lines: int = 1_000_000) -> Action:
    """A stream with one event of that many lines, none of which ends a JSON value."""

    def act(exchange: Exchange) -> None:
        exchange.begin()
        for _ in range(lines // 10_000):
            exchange.piece(b"data:[\n" * 10_000)
        exchange.end()

    return act


def page(code: int = 200) -> Action:
    """A page for people, where JSON or events were asked for."""
    html = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    return lambda exchange: exchange.reply(code, html, "text/html; charset=utf-8")


def body(value: Any) -> Action:
    """200 with that JSON, or those bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda exchange: exchange.reply(200, data)


def raw(data: bytes, kind: str = EVENTS, headers: Mapping[str, str] = {}) -> Action:
    """200 with those bytes, said to be of that kind."""
    return lambda exchange: exchange.reply(200, data, kind, headers)


def bomb(size: int = 200 << 20, kind: str = EVENTS) -> Action:
    """That many bytes of nothing, small on their way; nobody asked for gzip."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(1 << 20)
    data = b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()
    return raw(data, kind, {"Content-Encoding": "gzip"})


def generated(*steps: Any, text: str = "Hello there, you", after: int = 2) -> Action:
    """As `streamed`, in TGI's form."""

    def act(exchange: Exchange) -> None:
        exchange.begin(headers={"X-Request-Id": "fault-stream"})
        for number, piece in enumerate(split(text)[:after]):
            token = {"id": number, "text": piece, "logprob": -0.5, "special": False}
            exchange.event({"index": number, "token": token, "generated_text": None})
        for step in steps:
            exchange.piece(step) if isinstance(step, bytes) else step(exchange)

    return act


def redirect(to: str, code: int = 307) -> Action:
    """Elsewhere."""
    return lambda exchange: exchange.reply(code, headers={"Location": to})


def after(seconds: float, action: Action) -> Action:
    """The action, so much later."""

    def act(exchange: Exchange) -> None:
        exchange.wait(seconds)
        action(exchange)

    return act


def events(pieces: Iterable[str], *, whole: bool = True) -> Iterable[bytes]:
    """A chat's stream in server-sent events; `whole`: with its end."""

    def one(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        chunk = {"id": "chatcmpl-f", "object": "chat.completion.chunk", "created": CREATED,
                 "model": "fault/model", "system_fingerprint": "faults",
                 "choices": [choice]}  # fmt: skip
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()

    yield one({"role": "assistant", "content": ""})
    for piece in pieces:
        yield one({"content": piece})
    if whole:
        yield one({}, "stop")
        yield b"data: [DONE]\n\n"


def broken_off(exchange: Exchange) -> None:
    """A step: a reset. What was sent gets there before: a reset may overtake it otherwise."""
    exchange.wait(0.3)
    exchange.reset()
