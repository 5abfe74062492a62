"""hfcore.Engine: streams, asyncio, timeouts, and engines that are shared."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hfcore import Completion, Delta, Engine, InvalidRequestError, Usage
from hfcore import engine as engine_module
from hfcore.engine import LoadBar, shared_engine, total
from hfcore.errors import EngineClosedError, HfcoreError, RequestTimeoutError
from hfcore.testing import tiny_model

MESSAGES = [{"role": "user", "content": "Hello"}]
ENDLESS = {"max_tokens": 90_000, "ignore_eos": True}
"""Minutes of work, so that what is idle within seconds was cancelled."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    roomy = tiny_model(tmp_path_factory.mktemp("roomy"), context_size=100_000)
    with Engine(roomy) as opened:
        yield opened


def waited_for(truth: Callable[[], bool], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not truth() and time.monotonic() < deadline:
        time.sleep(0.01)
    return truth()


def idle(engine: Engine) -> bool:
    return engine.metrics()["running"] == 0


def test_a_stream_gives_one_delta_for_each_token_and_usage_at_the_end(engine: Engine) -> None:
    deltas = list(engine.stream("Hello", max_tokens=5, temperature=0, ignore_eos=True))
    assert [len(d.token_ids) for d in deltas] == [1] * 5
    assert [d.finish_reason for d in deltas] == [None] * 4 + ["length"]
    assert [d.usage is None for d in deltas] == [True] * 4 + [False]
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 5


def test_generate_is_the_stream_summed(engine: Engine) -> None:
    request = {"max_tokens": 8, "temperature": 0, "logprobs": True}
    done = engine.generate(MESSAGES, **request)
    summed = total(list(engine.stream(MESSAGES, **request)))
    assert (done.text, done.token_ids, done.logprobs, done.finish_reason) == (
        summed.text, summed.token_ids, summed.logprobs, summed.finish_reason,
    )  # fmt: skip


def test_text_and_ids_are_prompts_too(engine: Engine) -> None:
    ids = engine.tokenizer.encode("Hello")
    same = {"max_tokens": 4, "temperature": 0}
    text = engine.generate("Hello", **same).text
    assert engine.generate(ids, **same).text == text
    assert engine.generate([int(i) for i in ids], **same).text == text


def test_logits_are_numpy_rows(engine: Engine) -> None:
    vocabulary = engine.tokenizer.vocab_size
    assert engine.logits([1, 2, 3]).shape == (vocabulary,)
    rows = engine.logits(np.array([1, 2, 3]), last_only=False)
    assert rows.shape == (3, vocabulary)
    assert rows.dtype == np.float32


def test_a_dropped_stream_cancels_its_request(engine: Engine) -> None:
    stream = engine.stream("Hello", **ENDLESS)
    next(stream)
    del stream
    gc.collect()
    assert waited_for(lambda: idle(engine))


def test_a_closed_stream_ends(engine: Engine) -> None:
    stream = engine.stream("Hello", **ENDLESS)
    next(stream)
    stream.close()
    stream.close()
    assert waited_for(lambda: idle(engine))


def test_a_request_that_takes_too_long_is_ended(engine: Engine) -> None:
    with pytest.raises(RequestTimeoutError, match=r"timeout of 0\.05 s"):
        engine.generate("Hello", **ENDLESS, timeout=0.05)
    assert waited_for(lambda: idle(engine))
    assert engine.generate("Hello", max_tokens=2, timeout=60).finish_reason is not None


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_timeout_is_seconds(engine: Engine, timeout: object) -> None:
    with pytest.raises(InvalidRequestError, match="timeout"):
        engine.stream("Hello", timeout=timeout)


@pytest.mark.parametrize("prompt", [None, 5, {"role": "user"}, iter("ab")])
def test_what_is_no_prompt_is_refused(engine: Engine, prompt: object) -> None:
    with pytest.raises(InvalidRequestError, match="a prompt is a str"):
        engine.generate(prompt)


def test_rates_are_of_decoding_alone() -> None:
    usage = Usage(10, 5, time_to_first_token=1.0, total_time=3.0)
    assert (usage.total_tokens, usage.tokens_per_second) == (15, 2.0)
    assert Usage(1, 1, 1.0, 1.0).tokens_per_second == 0


def test_no_deltas_sum_to_nothing() -> None:
    assert total([]) == Completion("", (), None, None, None)
    assert total([Delta("a"), Delta("b")]).text == "ab"


# asyncio


async def test_async_is_the_same_answer(engine: Engine) -> None:
    request = {"max_tokens": 8, "temperature": 0}
    done = await engine.agenerate(MESSAGES, **request)
    assert done.text == engine.generate(MESSAGES, **request).text


async def test_many_streams_share_one_loop_without_a_thread_each(engine: Engine) -> None:
    await engine.agenerate("Hello", max_tokens=1)
    most = 0

    async def one(n: int) -> str:
        nonlocal most
        text = ""
        async for delta in engine.astream(f"Hello {n}", max_tokens=20, temperature=0):
            most = max(most, threading.active_count())
            text += delta.text
        return text

    before = threading.active_count()
    together = await asyncio.gather(*(one(n) for n in range(24)))
    # Submitting uses the loop's own pool of workers; no more than that.
    assert most - before <= (os.cpu_count() or 1) + 4
    assert together == [await one(n) for n in range(24)]


async def test_a_loop_goes_on_while_a_model_runs(engine: Engine) -> None:
    running = asyncio.create_task(engine.agenerate("Hello", **ENDLESS))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not running.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_closing_an_async_stream_cancels_its_request(engine: Engine) -> None:
    deltas = engine.astream("Hello", **ENDLESS)
    await anext(deltas)
    await deltas.aclose()
    assert waited_for(lambda: idle(engine))


async def test_cancelling_a_task_cancels_its_request(engine: Engine) -> None:
    task = asyncio.create_task(engine.agenerate("Hello", **ENDLESS))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waited_for(lambda: idle(engine))


async def test_a_slow_async_request_is_ended(engine: Engine) -> None:
    with pytest.raises(RequestTimeoutError):
        await engine.agenerate("Hello", **ENDLESS, timeout=0.05)
    assert waited_for(lambda: idle(engine))


def test_every_event_loop_gets_its_own_wake_ups(engine: Engine) -> None:
    texts = {
        asyncio.run(engine.agenerate("Hello", max_tokens=5, temperature=0)).text for _ in range(3)
    }
    assert len(texts) == 1


def test_an_int8_cache_takes_little_more_than_half_and_answers_nearly_the_same(tiny: Path) -> None:
    ids = list(range(40))
    found = []
    for dtype in ("f16", "int8"):
        with Engine(tiny, kv_cache_dtype=dtype, context_size=512, max_sequences=1) as engine:
            assert engine.info["kv_cache_dtype"] == dtype
            found.append((engine.logits(ids), engine.info["kv_cache_bytes"]))
    (f16, large), (int8, small) = found
    assert 0.5 * large < small < 0.65 * large
    apart = abs(f16 - int8).max()
    assert 0 < apart < 0.05 * abs(f16).max()
    with Engine(tiny, device="reference") as engine:
        assert engine.info["kv_cache_dtype"] == "f32"


def test_twice_as_many_tokens_fit_an_int8_cache_of_the_same_bytes(tiny: Path) -> None:
    sizes = []
    for dtype in ("f16", "int8"):
        with Engine(tiny, type_k=dtype, kv_cache_bytes=1 << 17) as engine:
            sizes.append(engine.info["context_size"])
    assert 1.5 * sizes[0] < sizes[1] <= 2 * sizes[0]


# shared engines


def test_equal_names_and_options_share_one_engine(tiny: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(tiny)
    one = shared_engine(tiny)
    assert not one.loaded
    assert shared_engine(link).get() is one.get() is shared_engine(str(tiny)).get()
    assert shared_engine(tiny, n_ctx=64).get() is not one.get()


def test_copies_and_pickles_find_the_same_engine(tiny: Path) -> None:
    one = shared_engine(tiny)
    engine = one.get()
    assert copy.deepcopy(one).get() is engine
    assert pickle.loads(pickle.dumps(one)).get() is engine


def test_an_engine_goes_with_its_last_holder(tiny: Path) -> None:
    holder = shared_engine(tiny, context_size=100)
    holder.get()
    before = len(engine_module._registry)
    del holder
    gc.collect()
    assert len(engine_module._registry) == before - 1


def test_threads_that_ask_at_once_load_once(tiny: Path) -> None:
    holders = [shared_engine(tiny, context_size=200) for _ in range(8)]
    threads = [threading.Thread(target=holder.get) for holder in holders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(holder.get()) for holder in holders}) == 1


def test_a_closed_engine_is_opened_again(tiny: Path) -> None:
    holder = shared_engine(tiny, context_size=300)
    first = holder.get()
    first.close()
    with pytest.raises(EngineClosedError):
        first.generate("Hello")
    assert holder.get().generate("Hello", max_tokens=1).usage is not None


def test_identity_tells_files_and_openings_apart(tiny: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy.gguf"
    copied.write_bytes(tiny.read_bytes())
    identities = [
        shared_engine(tiny).identity(), shared_engine(copied).identity(),
        shared_engine(tiny, context_size=64).identity(),
        shared_engine(tiny, kv_cache_dtype="int8").identity(),
    ]  # fmt: skip
    assert len({str(identity) for identity in identities}) == 4
    os.utime(copied, ns=(1, 1))
    assert shared_engine(copied).identity() != identities[1]
    assert shared_engine("owner/none").identity() == {"model": "owner/none"}


def test_identity_and_repr_never_show_a_token() -> None:
    from pydantic import SecretStr

    holder = shared_engine("owner/none", token=SecretStr("hf_s3cret"), local_files_only=True)
    assert "s3cret" not in f"{holder!r} {holder.identity()}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_after_fork_opens_its_own_engine(tiny: Path) -> None:
    holder = shared_engine(tiny, context_size=400)
    text = holder.get().generate("Hello", max_tokens=4, temperature=0).text
    child = os.fork()
    if child == 0:
        same = False
        try:
            same = holder.get().generate("Hello", max_tokens=4, temperature=0).text == text
        finally:
            os._exit(0 if same else 1)
    ended: list[int] = []

    def has_ended() -> bool:
        if not ended:
            pid, status = os.waitpid(child, os.WNOHANG)
            ended.extend([os.waitstatus_to_exitcode(status)] if pid else [])
        return bool(ended)

    if not waited_for(has_ended, 20):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hung")
    assert ended == [0]
    assert holder.get().generate("Hello", max_tokens=4, temperature=0).text == text


def test_ctrl_c_interrupts_a_wait_and_the_process_ends(tiny: Path) -> None:
    program = (
        "import sys, hfcore\n"
        "engine = hfcore.Engine(sys.argv[1], context_size=2000)\n"
        "print('up', flush=True)\n"
        "while True: engine.generate('Hello', max_tokens=1500, ignore_eos=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tiny)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert b"KeyboardInterrupt" in errors
    assert process.returncode != 0


def test_errors_are_of_one_tree_and_at_once(engine: Engine) -> None:
    for request in ({"max_tokens": 0}, {"temperature": -1}, {"topp": 1}, {"num_beams": 2}):
        with pytest.raises(HfcoreError):
            engine.stream("Hello", **request)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_slow_loads_show_a_bar_on_a_terminal_and_wipe_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    terminal = Terminal()
    bar = LoadBar(terminal, patience=0)
    report = bar.shown()
    assert report is not None
    report(30_000_000, 60_000_000)
    assert "[###############...............] 30 of 60 MB" in terminal.getvalue()
    bar.close()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_quick_loads_and_pipes_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    assert LoadBar(io.StringIO()).shown() is None
    terminal = Terminal()
    bar = LoadBar(terminal, patience=60)
    report = bar.shown()
    assert report is not None
    report(1, 2)
    bar.close()
    assert terminal.getvalue() == ""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert LoadBar(terminal).shown() is None


def test_a_draft_model_changes_no_answer_and_must_know_the_same_tokens(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, name="model")
    other = tiny_model(tmp_path, name="other", seed=1)
    request = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with Engine(model) as plain, Engine(model, draft_model=model) as own:
        for prompt in ("Hello", "One two three"):
            assert plain.generate(prompt, **request).text == own.generate(prompt, **request).text
        assert own.info["draft_model"] == str(model)
        again = pickle.loads(pickle.dumps(own))
        assert again.info["draft_model"] == str(model)
        again.close()
    with Engine(model, draft_model=other) as drafted:
        assert drafted.generate("Hello", **request).finish_reason == "length"
    with pytest.raises(InvalidRequestError, match="draft_model would do nothing"):
        Engine(model, draft_model=other, speculation=False)
