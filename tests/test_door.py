"""The door: what crosses between Python and the engine, and what is refused by name."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from hfcore import _core, errors, testing

MESSAGES = [{"role": "user", "content": "Hello"}]
SHOW = _core.ChatTemplate("{{ x | tojson }}", name="show")


def shown(value: Any) -> str:
    """The value as a template sees it, written as JSON."""
    return SHOW.render(MESSAGES, x=value)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_core.Engine]:
    path = testing.tiny_model(tmp_path_factory.mktemp("tiny"))
    engine = _core.Engine(path, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[_core.Stream]:
    """A request that goes on for much longer than a test does."""
    path = testing.tiny_model(tmp_path, context_size=1_000_000)
    engine = _core.Engine(path, threads=1, kv_cache_bytes=1 << 30)
    yield engine.submit("in the", {"ignore_eos": True})
    engine.close()


# Values going in ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        (-(2**63), str(-(2**63))),
        (2**64 - 1, str(2**64 - 1)),
        (10**40, str(10**40)),
        (1.5, "1.5"),
        (np.int32(7), "7"),
        (np.float32(0.5), "0.5"),
        (Decimal("0.25"), "0.25"),
        ("h\u00e9 \U0001f600\0", '"h\u00e9 \U0001f600\\u0000"'),
        ((1, [2, (3,)]), "[1, [2, [3]]]"),
        (range(3), "[0, 1, 2]"),
        ({"b": 1, "a": 2}, '{"b": 1, "a": 2}'),
        (OrderedDict(a=UserDict(b=1)), '{"a": {"b": 1}}'),
        (MappingProxyType({"a": 1}), '{"a": 1}'),
        ({1: "one"}, '{"1": "one"}'),
    ],
    ids=repr,
)
def test_json_like_values_reach_the_template_as_they_are(value: Any, expected: str) -> None:
    assert shown(value) == expected


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (date(2024, 1, 2), r"variables\.x must be .*, got date"),
        ({"a": [1, object()]}, r"variables\.x\.a\[1\] must be .*, got object"),
        ({(1, 2): 3}, r"keys of variables\.x must be str, got tuple"),
        ({1, 2}, r"variables\.x must be .*, got set"),
        (b"bytes", r"variables\.x must be .*, got bytes"),
        (float("nan"), r"variables\.x must be finite, got NaN"),
        (float("-inf"), r"variables\.x must be finite, got -inf"),
        ("\ud800", r"variables\.x must be text, got a lone surrogate in it"),
        ({"\udfff": 1}, r"variables\.x must be text, got a lone surrogate in it"),
    ],
    ids=repr,
)
def test_what_is_not_json_like_is_refused_by_its_place(value: Any, complaint: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=complaint):
        shown(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(errors.InvalidRequestError, match="nested at most 100 deep"):
        shown(knot)


def test_an_error_of_the_callers_own_object_comes_through() -> None:
    class Broken(UserDict[str, int]):
        def items(self) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        shown(Broken(a=1))


def test_options_take_no_integer_beyond_64_bits(engine: _core.Engine) -> None:
    with pytest.raises(errors.InvalidRequestError, match="max_tokens must be an int of at most 64"):
        engine.submit("a", {"max_tokens": 10**30})


# Token ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda ids: np.array(ids, np.uint32),
        lambda ids: np.array(ids, np.int64),
        lambda ids: np.array([[i, 0] for i in ids], np.uint32)[:, 0],
        lambda ids: [np.int16(i) for i in ids],
    ],
    ids=["list", "tuple", "uint32", "int64", "strided", "numpy scalars"],
)
def test_ids_come_from_any_sequence_of_ints(
    engine: _core.Engine, make: Callable[[list[int]], Any]
) -> None:
    tokenizer = engine.tokenizer
    ids = [int(i) for i in tokenizer.encode("in the end", add_special_tokens=False)]
    assert tokenizer.decode(make(ids)) == "in the end"


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([1, -1], r"ids\[1\] must be an int from 0 to 4294967295, got -1"),
        ([2**32], r"ids\[0\] must be an int from 0 to 4294967295, got 4294967296"),
        ([1.0], r"ids\[0\] must be an int"),
        ([None], r"ids\[0\] must be an int"),
        (np.array([1.0]), r"ids\[0\] must be an int"),
        (np.zeros((2, 2), np.uint32), "ids must have 1 dimension, got 2"),
        ("text", "ids must be a sequence of token ids, got str"),
        (b"bytes", "ids must be a sequence of token ids, got bytes"),
        (7, "ids must be a sequence of token ids, got int"),
        ({1: 2}, "ids must be a sequence of token ids, got dict"),
        ([10**6], "below the vocabulary size"),
    ],
    ids=repr,
)
def test_what_is_no_token_id_is_refused(engine: _core.Engine, ids: Any, complaint: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=complaint):
        engine.tokenizer.decode(ids)


def test_ids_come_out_as_numpy_uint32(engine: _core.Engine) -> None:
    ids = engine.tokenizer.encode("the end")
    assert ids.dtype == np.uint32
    assert [type(batch) for batch in engine.tokenizer.encode_batch(["a", "b"])] == [np.ndarray] * 2


# Templates ----------------------------------------------------------------------------------------


def test_strftime_now_shows_the_moment_that_was_given() -> None:
    template = _core.ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}")
    moment = datetime(2024, 2, 29, 23, 59, 58)
    assert template.render(MESSAGES, now=moment) == "2024-02-29 23:59:58"
    with pytest.raises(errors.InvalidRequestError, match="now must be a datetime, got str"):
        template.render(MESSAGES, now="today")  # type: ignore[arg-type]


def test_a_template_error_says_where_and_whose_it_is() -> None:
    with pytest.raises(errors.TemplateError) as broken:
        _core.ChatTemplate("line one\n{% for %}", name="mine")
    assert (broken.value.name, broken.value.line, broken.value.thrown) == ("mine", 2, False)
    with pytest.raises(errors.TemplateError, match="roles must alternate") as thrown:
        _core.ChatTemplate("{{ raise_exception('roles must alternate') }}").render(MESSAGES)
    assert thrown.value.thrown


def test_generation_spans_count_code_points() -> None:
    template = _core.ChatTemplate("\U0001f600{% generation %}ab{% endgeneration %}c")
    assert template.render_with_spans(MESSAGES) == ("\U0001f600abc", [(1, 3)])


def test_special_tokens_are_variables_of_text() -> None:
    template = _core.ChatTemplate("{{ bos_token }}", special_tokens={"bos_token": "<s>"})
    assert template.render(MESSAGES) == "<s>"
    with pytest.raises(errors.InvalidRequestError, match=r"special_tokens\.a must be a str, got 1"):
        _core.ChatTemplate("", special_tokens={"a": 1})  # type: ignore[dict-item]


# The engine ---------------------------------------------------------------------------------------


def test_a_stream_ends_with_a_reason_and_what_it_cost(engine: _core.Engine) -> None:
    deltas = list(engine.submit("in the", {"max_tokens": 5, "ignore_eos": True}))
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    usage = deltas[-1].usage
    assert usage is not None
    assert usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas) == 5
    assert 0 < usage.time_to_first_token <= usage.total_time


def test_values_of_a_stream_never_change_and_compare(engine: _core.Engine) -> None:
    options = {"max_tokens": 3, "logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    first, again = (next(engine.submit("in the", options)) for _ in range(2))
    assert first == again
    assert first != next(engine.submit("on", options))
    assert first.logprobs is not None
    assert [logprob.token_id for logprob in first.logprobs] == first.token_ids
    assert len(first.logprobs[0].top) == 2
    with pytest.raises(AttributeError):
        first.text = "other"  # type: ignore[misc]
    assert "Delta(" in repr(first)
    assert "TokenLogprob(" in repr(first.logprobs[0])


def test_a_notifier_names_each_stream_that_has_something(engine: _core.Engine) -> None:
    notifier = _core.Notifier()
    streams = {key: engine.submit("in the", {"max_tokens": 4}) for key in (3, 9)}
    for key, stream in streams.items():
        stream.subscribe(notifier, key)
    ended: set[int] = set()
    while ended != {3, 9}:
        readable, _, _ = select.select([notifier.fileno()], [], [], 30)
        assert readable, "nothing came for 30 seconds"
        for key in notifier.drain():
            ended |= drained(streams[key], key)
    notifier.drain()  # what came between a `drain` and the end
    assert notifier.drain() == []


def drained(stream: _core.Stream, key: int) -> set[int]:
    """Take all that is there; the key if that was the end."""
    try:
        while stream.try_next() is not None:
            pass
    except StopIteration:
        return {key}
    return set()


def test_a_closed_stream_is_over_for_whoever_waits(endless: _core.Stream) -> None:
    next(endless)
    threading.Timer(0.1, endless.close).start()
    for _ in endless:
        pass
    endless.close()
    assert repr(endless) == "Stream(ended)"


def test_other_threads_run_while_a_stream_waits(endless: _core.Stream) -> None:
    reached = threading.Event()
    threading.Thread(target=reached.set).start()
    for _ in endless:
        if reached.is_set():
            break
    assert reached.is_set()


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no SIGINT there")
def test_ctrl_c_interrupts_a_stream_that_waits(endless: _core.Stream) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        list(endless)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (
            {"role": "user"},
            "prompt must be a str, a list of messages or token ids, got one message",
        ),
        ([object()], r"prompt\[0\] must be a message \(a mapping\) or a token id, got object"),
        (5, "prompt must be a sequence of token ids, got int"),
        (["a"], r"prompt\[0\] must be a message \(a mapping\) or a token id, got str"),
        ([1, MESSAGES[0]], r"prompt\[1\] must be an int"),
        ([], "prompt must have at least 1 token, got 0"),
        ("\ud800", "prompt must be text, got a lone surrogate in it"),
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused(engine: _core.Engine, prompt: Any, complaint: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=complaint):
        engine.submit(prompt, {})


def test_an_unknown_option_names_the_nearest(engine: _core.Engine) -> None:
    with pytest.raises(errors.UnknownOptionError) as caught:
        engine.submit("a", {"max_token": 5})
    assert (caught.value.name, caught.value.nearest) == ("max_token", "max_tokens")


def test_a_prompt_too_long_says_both_numbers(engine: _core.Engine) -> None:
    with pytest.raises(errors.ContextOverflowError) as caught:
        engine.submit([1] * 5000, {})
    assert caught.value.prompt_tokens == 5000
    assert 0 < caught.value.limit <= 2048


def test_logits_have_a_row_for_each_token_if_wanted(engine: _core.Engine) -> None:
    every = engine.logits([1, 2, 3], last_only=False)
    assert every.shape == (3, engine.info["vocab_size"])
    np.testing.assert_array_equal(engine.logits(np.array([1, 2, 3])), every[-1])


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    path = testing.tiny_model(tmp_path, context_size=1_000_000)
    engine = _core.Engine(path, threads=1, kv_cache_bytes=1 << 30)
    stream = engine.submit("in the", {"ignore_eos": True})
    engine.close()
    engine.close()
    with pytest.raises(errors.EngineClosedError):
        engine.submit("a", {})
    with pytest.raises(errors.EngineClosedError):
        list(stream)


def test_a_missing_file_is_also_a_file_not_found_error(tmp_path: Path) -> None:
    missing = tmp_path / "none.gguf"
    with pytest.raises(errors.ModelNotFoundError) as caught:
        _core.Engine(missing)
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.path == str(missing)


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    engine = _core.Engine(testing.tiny_model(tmp_path, chat_template=None), threads=1)
    assert engine.chat_template is None
    with pytest.raises(errors.NoChatTemplateError):
        engine.submit(MESSAGES, {})


@pytest.mark.parametrize("size", [-1, 1.5, "8", True], ids=repr)
def test_a_size_is_an_int_from_0_up(tmp_path: Path, size: Any) -> None:
    with pytest.raises(errors.InvalidRequestError, match="threads must be an int from 0 up, got"):
        _core.Engine(testing.tiny_model(tmp_path), threads=size)


def test_an_unknown_device_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match="cpu, reference") as caught:
        _core.Engine(testing.tiny_model(tmp_path), device="tpu")
    assert (caught.value.what, caught.value.name) == ("device", "tpu")


def test_progress_ends_at_the_whole_and_what_it_raises_ends_the_loading(tmp_path: Path) -> None:
    path = testing.tiny_model(tmp_path)
    seen: list[tuple[int, int]] = []
    _core.Engine(path, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1]

    calls = 0

    def refuse(_done: int, _total: int) -> None:
        nonlocal calls
        calls += 1
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        _core.Engine(path, progress=refuse)
    assert calls == 1


# Blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_dequantize_gives_what_the_gguf_package_gives(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, name)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 60, (5, size), dtype=np.uint8)
    expected = gguf.quants.dequantize(blocks, kind)
    np.testing.assert_array_equal(_core.dequantize(name, blocks), expected.reshape(5, -1))


def test_dequantize_refuses_other_arrays() -> None:
    with pytest.raises(
        errors.InvalidRequestError, match="a block of Q4_0 has 18 bytes, got 34 for 2"
    ):
        _core.dequantize("Q4_0", np.zeros((2, 17), np.uint8))
    with pytest.raises(errors.InvalidRequestError, match="uint8 with 2 dimensions"):
        _core.dequantize("Q4_0", np.zeros(18, np.uint8))
    with pytest.raises(errors.UnsupportedModelError, match="Q9"):
        _core.dequantize("Q9", np.zeros((1, 18), np.uint8))
    assert _core.dequantize("Q4_0", np.zeros((0, 18), np.uint8)).shape == (0, 32)


def test_lists_that_hold_one_another_many_times_are_refused_not_copied_out() -> None:
    nested: list[object] = ["x"]
    for _ in range(60):
        nested = [nested, nested]
    template = _core.ChatTemplate("{{ bomb | length }}")
    with pytest.raises(errors.InvalidRequestError, match="variables must hold at most"):
        template.render(MESSAGES, bomb=nested)
