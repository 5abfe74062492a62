"""Every fault of a server ends as documented, sync and async: nothing hangs, no thread is left.

Attempts are counted at the server. What is tried again is what a later attempt may cure, and never
an answer of which something was handed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from servers import faults
from servers.loopback import Exchange
from servers.recording import Action, Answer, Recording

from hfcore import ChatHuggingFace, HuggingFaceEndpoint, connection
from hfcore.errors import (
    HfcoreError,
    RemoteAccessError,
    RemoteAuthenticationError,
    RemoteConnectionError,
    RemoteError,
    RemoteNotFoundError,
    RemoteRateLimitError,
    RemoteRequestError,
    RemoteResponseError,
    RemoteServerError,
    RemoteStreamError,
    RemoteTimeoutError,
    RequestTimeoutError,
)

TOKEN = "hf_a_secret_of_these_tests"  # noqa: S105  # no secret
WAYS = ("invoke", "stream", "ainvoke", "astream")

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No token of the machine's, and short pauses: how long they are has a test of its own."""
    for name in ("HF_TOKEN", "HUGGINGFACEHUB_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    pause = connection.Attempts.pause
    monkeypatch.setattr(
        connection.Attempts, "pause", lambda self, error: min(pause(self, error), 0.01)
    )
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    left = [thread for thread in left if not thread.name.startswith(("asyncio", "AnyIO"))]
    assert left == []


def chat(server: Recording, path: str = "/v1", **more: Any) -> ChatHuggingFace:
    given = {"endpoint_url": server.url + path, "model": "owner/name", "timeout": 5.0, **more}
    return ChatHuggingFace(llm=HuggingFaceEndpoint(**given))


async def answered(model: Any, way: str, **more: Any) -> list[str]:
    """The texts that come, one for each chunk; what came before an error is in its `came`."""
    came: list[str] = []
    try:
        if way == "invoke":
            came.append(await asyncio.to_thread(lambda: text_of(model.invoke("Hi", **more))))
        elif way == "ainvoke":
            came.append(text_of(await model.ainvoke("Hi", **more)))
        elif way == "stream":

            def read() -> None:
                came.extend(text_of(chunk) for chunk in model.stream("Hi", **more))

            await asyncio.to_thread(read)
        else:
            async for chunk in model.astream("Hi", **more):
                came.append(text_of(chunk))
    except HfcoreError as error:
        error.came = "".join(came)  # type: ignore[attr-defined]  # for the tests
        raise
    return came


def text_of(message: Any) -> str:
    return message if isinstance(message, str) else str(message.text)


@dataclass(frozen=True)
class Fault:
    """A fault that does not go away, and how it ends."""

    make: Callable[[], Action]
    kind: type[HfcoreError]
    words: str = ""
    attempts: int = 1
    status: int = 0
    request_id: str = ""
    came: str = ""
    options: dict[str, Any] = field(default_factory=dict)


FAULTS = {
    "429": Fault(faults.too_many, RemoteRateLimitError, "Rate limit reached", 3, 429, "fault-429"),
    "429 for a day": Fault(
        lambda: faults.too_many("86400"), RemoteRateLimitError, "Rate limit", 1, 429, "fault-429"
    ),
    "503": Fault(faults.unavailable, RemoteServerError, "Model is loading", 3, 503, "fault-503"),
    "500": Fault(faults.broken, RemoteServerError, "Something went wrong", 3, 500, "fault-500"),
    "501": Fault(
        lambda: faults.broken(501), RemoteServerError, "Something went", 1, 501, "fault-501"
    ),
    "a proxy's page with 502": Fault(
        lambda: faults.plain(502, "<html>Bad Gateway</html>"), RemoteServerError, "502", 3, 502,
        "fault-502",
    ),
    "401": Fault(
        faults.unauthorised, RemoteAuthenticationError, "Invalid username", 1, 401, "fault-401"
    ),
    "403 gated": Fault(faults.gated, RemoteAccessError, "restricted", 1, 403, "fault-403"),
    "404": Fault(faults.missing, RemoteNotFoundError, "does not exist", 1, 404, "fault-404"),
    "422": Fault(
        faults.invalid, RemoteRequestError, "body.top_k: extra fields", 1, 422, "fault-422"
    ),
    "400 in plain text": Fault(
        lambda: faults.plain(400, "no such thing"), RemoteRequestError, "no such thing", 1, 400,
        "fault-400",
    ),
    "reset at once": Fault(faults.reset, RemoteConnectionError, "", 3),
    "closed at once": Fault(faults.closed, RemoteConnectionError, "", 3),
    "silent": Fault(faults.silent, RemoteTimeoutError, "0.3", 1, options={"timeout": 0.3}),
    "reset mid-stream": Fault(faults.reset_mid_stream, RemoteStreamError, "", 1, came="Hello"),
    "closed mid-stream": Fault(faults.closed_mid_stream, RemoteStreamError, "", 1, came="Hello"),
    "ended early": Fault(faults.ended_early, RemoteStreamError, "", 1, came="Hello"),
    "reset before the first token": Fault(
        lambda: faults.reset_mid_stream(after=0), RemoteStreamError, "", 3
    ),
    "stalled": Fault(
        faults.stalled, RemoteTimeoutError, "0.3", 1, came="Hello", options={"timeout": 0.3}
    ),
    "malformed": Fault(faults.malformed, RemoteResponseError, "no JSON", 1, came="Hello"),
    "an event that is no chat": Fault(
        lambda: faults.malformed(b"data: [1, 2]\n\n"), RemoteResponseError, "", 1, came="Hello"
    ),
    "an error in the stream": Fault(
        faults.error_event, RemoteError, "CUDA out of memory", 1, came="Hello"
    ),
    "a line of 10 MB": Fault(faults.long_line, RemoteResponseError, "longer than 4 MiB"),
    "a line without end": Fault(
        lambda: faults.long_line(ends=False), RemoteResponseError, "longer than 4 MiB"
    ),
    "an event of a million lines": Fault(faults.many_lines, RemoteResponseError),
    "a page": Fault(faults.page, RemoteResponseError, "text/html"),
    "half an answer": Fault(faults.cut_body, RemoteStreamError, "", 3),
    "an answer that is none": Fault(lambda: faults.body([1]), RemoteResponseError),
    "no JSON": Fault(lambda: faults.body(b"{"), RemoteResponseError, "no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_fault_that_stays_ends_as_documented(fault: Fault, way: str) -> None:
    with Recording(*(fault.make() for _ in range(5))) as server:
        model = chat(server, token=TOKEN, **fault.options)
        with pytest.raises(fault.kind) as caught:
            await answered(model, way)
        assert len(server.asked) == fault.attempts
    error: Any = caught.value
    assert fault.words in str(error)
    assert error.came == (fault.came if "stream" in way else "")
    if fault.status:
        assert (error.status, error.request_id) == (fault.status, fault.request_id)
    assert TOKEN not in f"{error!r} {error} {vars(error)}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "script",
    [
        [faults.unavailable, faults.unavailable],
        [faults.too_many],
        [faults.too_many, faults.broken],
        [faults.reset],
        [faults.closed, faults.reset],
        [lambda: faults.reset_mid_stream(after=0)],
    ],
)
async def test_what_passes_is_not_noticed(script: list[Callable[[], Action]], way: str) -> None:
    with Recording(*(make() for make in script)) as server:
        assert "".join(await answered(chat(server), way)) == "You said: Hi"
        assert len(server.asked) == len(script) + 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make",
    [
        faults.bytewise, faults.written_otherwise, lambda: faults.bytewise(size=3),
        lambda: faults.after(0.2, faults.bytewise(size=50)),
    ],
)  # fmt: skip
async def test_a_sound_stream_is_read_however_it_is_cut(
    make: Callable[[], Action], way: str
) -> None:
    with Recording(make()) as server:
        assert "".join(await answered(chat(server), way)) == faults.TEXT


@pytest.mark.parametrize("retries", [0, 1, 4])
@pytest.mark.parametrize("way", ["invoke", "astream"])
async def test_max_retries_counts_further_attempts(retries: int, way: str) -> None:
    with Recording(*[faults.broken()] * 9) as server:
        with pytest.raises(RemoteServerError):
            await answered(chat(server, max_retries=retries), way)
        assert len(server.asked) == retries + 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_stream_that_only_keeps_the_line_open_ends_with_the_requests_timeout(
    way: str,
) -> None:
    with Recording(faults.trickled()) as server:
        began = time.monotonic()
        with pytest.raises(RequestTimeoutError, match=r"0\.4"):
            await answered(chat(server), way, timeout=0.4)
        assert time.monotonic() - began < 5
        assert len(server.asked) == 1


async def test_a_requests_timeout_holds_for_all_attempts_together() -> None:
    with Recording(*[faults.after(0.2, faults.broken())] * 9) as server:
        began = time.monotonic()
        with pytest.raises(HfcoreError):
            await answered(chat(server, max_retries=8), "invoke", timeout=0.5)
        assert time.monotonic() - began < 3
        assert len(server.asked) <= 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_takes_neither_token_nor_prompt_along(code: int, way: str) -> None:
    with Recording() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost") + "/v1/chat/completions"
        with Recording(faults.redirect(elsewhere, code)) as server:
            model = chat(server, token=TOKEN, headers={"X-Key": TOKEN}, bill_to="team")
            with pytest.raises(RemoteResponseError, match="redirects are not followed") as caught:
                await answered(model, way)
            assert caught.value.status == code
            assert server.asked[0].token == TOKEN
        assert other.requests == []


async def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with Recording(faults.too_many("1")) as server:
        began = time.monotonic()
        assert await answered(chat(server), "invoke") == ["You said: Hi"]
        assert time.monotonic() - began >= 1.0
        assert server.asked[1].at - server.asked[0].at >= 1.0


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_a_stream_that_nobody_reads_on_is_given_up(way: str) -> None:
    with Recording(faults.stalled()) as server:
        model = chat(server, timeout=20)
        if way == "stream":
            chunks = model.stream("Hi")
            next(chunks)
            chunks.close()  # type: ignore[attr-defined]  # it is a generator
        else:
            achunks = model.astream("Hi")
            await anext(achunks)
            await achunks.aclose()  # type: ignore[attr-defined]
        await _until(lambda: server.gone == 1)


async def test_a_cancelled_task_leaves_the_server() -> None:
    with Recording(faults.silent()) as server:
        task = asyncio.create_task(chat(server).ainvoke("Hi"))
        await _until(lambda: len(server.asked) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _until(lambda: server.gone == 1)


async def test_others_go_on_while_one_is_waiting() -> None:
    enough = threading.Event()

    def slowly(exchange: Exchange) -> None:
        while not enough.is_set():
            exchange.wait(0.02)
        exchange.reply_json(503, {"error": "busy"})

    with Recording(slowly) as server:
        model = chat(server, max_retries=0)
        slow = asyncio.create_task(model.ainvoke("Hi"))
        await _until(lambda: len(server.asked) == 1)
        assert (await model.ainvoke("Hi")).text == "You said: Hi"
        assert not slow.done()
        enough.set()
        with pytest.raises(RemoteServerError):
            await slow


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("make", "kind", "attempts"),
    [
        (faults.unavailable, RemoteServerError, 3),
        (faults.missing, RemoteNotFoundError, 2),  # as a completion, then as a chat
        (faults.unauthorised, RemoteAuthenticationError, 1),
        (faults.reset, RemoteConnectionError, 3),
        (faults.page, RemoteResponseError, 1),
        (faults.many_lines, RemoteResponseError, 1),
    ],
)
async def test_texts_end_the_same_way(
    make: Callable[[], Action], kind: type[HfcoreError], attempts: int, way: str
) -> None:
    with Recording(*(make() for _ in range(5))) as server:
        model = HuggingFaceEndpoint(endpoint_url=f"{server.url}/v1", timeout=5.0)
        with pytest.raises(kind):
            await answered(model, way)
        assert len(server.asked) == attempts


TGI_FAULTS = {
    "reset": (lambda: faults.generated(faults.broken_off), RemoteStreamError, "broke off"),
    "ended early": (lambda: faults.generated(Exchange.end), RemoteStreamError, "before"),
    "stalled": (lambda: faults.generated(lambda e: e.wait(60)), RemoteTimeoutError, "0.5"),
    "an error in the stream": (
        lambda: faults.generated(
            b'data: {"error": "Request failed", "error_type": "generation"}\n\n', Exchange.end
        ),
        RemoteError,
        "Request failed",
    ),
    "malformed": (
        lambda: faults.generated(b'data: {"token": \n\n', Exchange.end),
        RemoteResponseError,
        "no JSON",
    ),
}


@pytest.mark.parametrize("way", ["stream", "astream"])
@pytest.mark.parametrize("fault", TGI_FAULTS.values(), ids=TGI_FAULTS)
async def test_streams_of_tgi_end_as_documented(fault: Any, way: str) -> None:
    make, kind, words = fault
    with Recording(make()) as server:
        model = HuggingFaceEndpoint(endpoint_url=server.url, timeout=0.5)
        with pytest.raises(kind, match=words) as caught:
            await answered(model, way)
        assert caught.value.came == "Hello"
        assert len(server.asked) == 1


@pytest.mark.parametrize("way", WAYS)
async def test_an_error_whose_words_do_not_end_ends_with_the_requests_timeout(way: str) -> None:
    with Recording(*[faults.trickled_error()] * 4) as server:
        began = time.monotonic()
        with pytest.raises(HfcoreError):
            await answered(chat(server), way, timeout=0.4)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("way", ["invoke", "astream"])
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_what_was_packed_small_is_not_unpacked_whole(kind: str, way: str) -> None:
    with Recording(faults.bomb(kind=kind)) as server:
        with pytest.raises(RemoteResponseError, match="longer than"):
            await answered(chat(server), way)
        assert len(server.asked) == 1


@pytest.mark.parametrize("seed", range(8))
def test_no_bytes_of_a_server_bring_anything_but_our_errors(seed: int) -> None:
    random = Random(seed)  # noqa: S311  # of test data
    sound = b"".join(faults.events(["Hello", " there"]))
    script = [faults.raw(mutated(sound, random)) for _ in range(25)]
    with Recording(*script) as server:
        model = chat(server, max_retries=0)
        for _ in script:
            with contextlib.suppress(HfcoreError):
                assert isinstance(model.invoke("Hi").text, str)


def mutated(data: bytes, random: Random) -> bytes:
    """A stream with some bytes lost, doubled or other ones; JSON's own more often than not."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 6)):
        place = random.randrange(len(changed))
        kind = random.randrange(4)
        if kind == 0:
            del changed[place : place + random.randint(1, 30)]
        elif kind == 1:
            changed[place:place] = changed[place : place + random.randint(1, 60)]
        elif kind == 2:
            changed[place] = random.choice(b'{}[]:,"\n\\0-9 nt')
        else:
            changed[place] = random.randrange(256)
    return bytes(changed)


def test_batches_share_nothing_that_breaks() -> None:
    script = [faults.unavailable() for _ in range(3)]
    with Recording(*script, *[Answer("fine")] * 6) as server:
        said = chat(server, max_retries=4).batch(["Hi"] * 6)
        assert [message.text for message in said] == ["fine"] * 6
        assert len(server.asked) == 9


async def _until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5
    while not true() and time.monotonic() < ends:
        await asyncio.sleep(0.01)
    assert true()
