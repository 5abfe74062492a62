"""Streams on event loops: asyncio, uvloop and trio, many at once, slow readers, cancelling."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from hfcore import Delta, Engine, InvalidRequestError, _core, loops
from hfcore.engine import total
from hfcore.errors import EngineClosedError
from hfcore.testing import tiny_model

try:
    import uvloop
except ImportError:  # there are platforms without
    uvloop = None  # type: ignore[assignment]  # its stub is a module

ENDLESS = {"max_tokens": 90_000, "ignore_eos": True}
FOUR = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
LONG = "word " * 200
"""So long that it is submitted by a thread."""

Main = Callable[[], Coroutine[Any, Any, Any]]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("roomy"), context_size=100_000)


@pytest.fixture(scope="module")
def engine(roomy: Path) -> Iterator[Engine]:
    with Engine(roomy) as opened:
        yield opened


def by_asyncio(main: Main) -> Any:
    return asyncio.run(main())


def by_uvloop(main: Main) -> Any:
    if uvloop is None:
        pytest.skip("there is no uvloop for this platform")
    return uvloop.run(main())


def by_trio(main: Main) -> Any:
    import trio

    return trio.run(main)


on_each_loop = pytest.mark.parametrize("run", [by_asyncio, by_uvloop, by_trio])
on_each_asyncio = pytest.mark.parametrize("run", [by_asyncio, by_uvloop])


def waited_for(truth: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not truth() and time.monotonic() < deadline:
        time.sleep(0.01)
    return truth()


def idle(engine: Engine) -> bool:
    numbers = engine.metrics()
    return numbers["running"] == numbers["waiting"] == 0


# every loop


@on_each_loop
def test_an_answer_is_the_same_on_every_loop(engine: Engine, run: Callable[[Main], Any]) -> None:
    for prompt in ("Hello", LONG, [{"role": "user", "content": "Hello"}], [1, 2, 3]):
        done = run(functools.partial(engine.agenerate, prompt, **FOUR))
        assert done.text == engine.generate(prompt, **FOUR).text
    gc.collect()
    assert not loops._pumps  # they go with their loops


@on_each_loop
@pytest.mark.parametrize("prompt", ["Hello", LONG])
def test_an_error_comes_with_the_first_delta(
    engine: Engine, run: Callable[[Main], Any], prompt: str
) -> None:
    async def main() -> None:
        deltas = engine.astream(prompt, max_tokens=0)
        with pytest.raises(InvalidRequestError, match="max_tokens"):
            await anext(deltas)
        with pytest.raises(StopAsyncIteration):
            await anext(deltas)

    run(main)


@on_each_loop
def test_closing_a_stream_cancels_its_request(engine: Engine, run: Callable[[Main], Any]) -> None:
    async def main() -> None:
        deltas = engine.astream("Hello", **ENDLESS)
        await anext(deltas)
        await deltas.aclose()
        assert waited_for(lambda: idle(engine))

    run(main)


@on_each_loop
def test_a_closed_engine_ends_who_waits_for_it(roomy: Path, run: Callable[[Main], Any]) -> None:
    async def main() -> None:
        engine = Engine(roomy)
        running, late = (engine.astream("Hello", **ENDLESS) for _ in range(2))
        await anext(running)
        closing = threading.Timer(0.05, engine.close)
        closing.start()
        for stream in (running, late):
            with pytest.raises(EngineClosedError):
                [delta async for delta in stream]
        closing.join()

    run(main)


@on_each_loop
def test_a_slow_reader_loses_nothing_and_nobody_waits_for_it(
    engine: Engine, run: Callable[[Main], Any]
) -> None:
    async def main() -> None:
        options = {"max_tokens": 500, "temperature": 0, "ignore_eos": True, "logprobs": True}
        stream = engine.astream("Hello", **options)
        deltas = [await anext(stream)]
        assert waited_for(lambda: idle(engine))  # the loop itself does nothing else meanwhile
        deltas += [delta async for delta in stream]
        assert 3 < len(deltas) < 100
        assert_same(deltas, engine, options)

    run(main)


def assert_same(deltas: list[Delta], engine: Engine, options: dict[str, Any]) -> None:
    got, whole = total(deltas), engine.generate("Hello", **options)
    assert (got.text, got.token_ids, got.logprobs, got.finish_reason) == (
        whole.text, whole.token_ids, whole.logprobs, whole.finish_reason,
    )  # fmt: skip
    assert len(got.token_ids) == len(got.logprobs or ()) == options["max_tokens"]


def test_a_slow_thread_loses_nothing_either(engine: Engine) -> None:
    options = {"max_tokens": 500, "temperature": 0, "ignore_eos": True, "logprobs": True}
    stream = engine.stream("Hello", **options)
    assert waited_for(lambda: idle(engine))
    deltas = list(stream)
    assert 3 < len(deltas) < 100
    assert_same(deltas, engine, options)


# asyncio and uvloop


@on_each_asyncio
def test_a_thousand_streams_at_once_all_end(engine: Engine, run: Callable[[Main], Any]) -> None:
    async def one(n: int) -> tuple[str, int]:
        most, text = 0, ""
        async for delta in engine.astream(f"{n}", **FOUR):
            most, text = max(most, threading.active_count()), text + delta.text
        return text, most

    async def main() -> list[tuple[str, int]]:
        return await asyncio.gather(*(one(n) for n in range(1000)))

    before = threading.active_count()
    together = run(main)
    assert max(most for _, most in together) <= before
    alone = [engine.generate(f"{n}", **FOUR).text for n in range(0, 1000, 100)]
    assert [text for text, _ in together[::100]] == alone


@on_each_asyncio
def test_long_prompts_at_once_are_submitted_by_few_threads(
    engine: Engine, run: Callable[[Main], Any]
) -> None:
    async def main() -> list[str]:
        before = threading.active_count()
        tasks = [asyncio.create_task(engine.agenerate(LONG, **FOUR)) for _ in range(50)]
        most = 0
        while not all(task.done() for task in tasks):
            most = max(most, threading.active_count() - before)
            await asyncio.sleep(0.001)
        assert most <= (os.cpu_count() or 1) + 4  # the loop's own pool, which may be slow to reuse
        return [task.result().text for task in tasks]

    assert set(run(main)) == {engine.generate(LONG, **FOUR).text}


@on_each_asyncio
def test_cancelled_tasks_cancel_their_requests(engine: Engine, run: Callable[[Main], Any]) -> None:
    async def main() -> None:
        prompts = ["Hello", LONG] * 20
        tasks = [asyncio.create_task(engine.agenerate(prompt, **ENDLESS)) for prompt in prompts]
        await asyncio.sleep(0.02)  # some run, some wait, some are not submitted yet
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in done)
        assert waited_for(lambda: idle(engine))

    run(main)


async def test_a_request_that_is_left_while_it_is_submitted_is_cancelled(engine: Engine) -> None:
    begun, go_on = threading.Event(), threading.Event()
    made: list[_core.Stream] = []

    def submit() -> _core.Stream:
        begun.set()
        go_on.wait(10)
        made.append(engine._core.submit("Hello", ENDLESS))
        return made[0]

    reader = loops.reader(submit, light=False)
    assert await asyncio.to_thread(begun.wait, 10)
    reader.close()
    go_on.set()
    assert waited_for(lambda: bool(made) and idle(engine))


async def test_a_loop_gets_its_turn_between_many_streams() -> None:
    class Woken(loops._LoopReader):
        __slots__ = ("woken",)
        woken: bool

        def wake(self) -> None:
            self.woken = True

    pump = loops._Pump(asyncio.get_running_loop())
    readers = [Woken(pump, key) for key in range(100)]
    for key, reader in enumerate(readers):
        reader.woken = False
        pump.readers[key] = pump._ready[key] = reader  # type: ignore[assignment]  # a stand-in
    pump._wake()
    woken = [sum(reader.woken for reader in readers)]
    while woken[-1] < len(readers):
        await asyncio.sleep(0)
        woken.append(sum(reader.woken for reader in readers))
    assert woken == [32, 64, 96, 100]
    asyncio.get_running_loop().remove_reader(pump.notifier.fileno())


def test_two_loops_in_two_threads_share_an_engine(engine: Engine) -> None:
    texts: list[str] = []

    async def main() -> None:
        done = await asyncio.gather(*(engine.agenerate(f"{n}", **FOUR) for n in range(20)))
        texts.append(" ".join(one.text for one in done))

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 2
    assert len(set(texts)) == 1


def test_a_loop_that_cannot_watch_descriptors_waits_in_threads(engine: Engine) -> None:
    class Plain(asyncio.SelectorEventLoop):
        def add_reader(self, *_: object) -> None:
            raise NotImplementedError

    loop = Plain()
    try:
        done = loop.run_until_complete(engine.agenerate("Hello", **FOUR))
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
    assert done.text == engine.generate("Hello", **FOUR).text


# trio, and nothing


def test_many_streams_share_one_run_of_trio(engine: Engine) -> None:
    import trio

    texts: dict[int, str] = {}

    async def one(n: int) -> None:
        texts[n] = (await engine.agenerate(f"{n}", **FOUR)).text

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for n in range(50):
                nursery.start_soon(one, n)

    trio.run(main)
    assert texts == {n: engine.generate(f"{n}", **FOUR).text for n in range(50)}


def test_a_cancelled_scope_of_trio_cancels_the_request(engine: Engine) -> None:
    import trio

    async def main() -> None:
        with trio.move_on_after(0.1) as scope:
            await engine.agenerate("Hello", **ENDLESS)
        assert scope.cancelled_caught
        assert waited_for(lambda: idle(engine))

    trio.run(main)


def test_without_a_loop_the_error_names_what_is_needed(engine: Engine) -> None:
    stream: AsyncGenerator[Delta, None] = engine.astream("Hello")
    with pytest.raises(RuntimeError, match="event loop of asyncio or trio"):
        stream.__anext__().send(None)  # as a loop of another kind would
