"""What bad input gets: the table of errors, each of hfcore's own tree, at once, with its words."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from hfcore import (
    ChatHuggingFace,
    ChatTemplate,
    Engine,
    HuggingFacePipeline,
    Tokenizer,
    _core,
)
from hfcore import errors as e
from hfcore.testing import tiny_model

USER = [{"role": "user", "content": "Hello"}]
BROKEN_TEMPLATE = "line one\n{% for m in messages %}\nno end"
THROWING_TEMPLATE = "line one\n{{ raise_exception('not like this') }}"
TASKS = Path("/proc/self/task")
SOON = 5.0
"""Seconds within which every error must come, on a busy machine."""


# model files: how a sound one is spoilt -> what is said


def value_of(key: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Replace the beginning of a string value, its length unchanged."""

    def spoil(raw: bytes) -> bytes:
        at = raw.index(key) + len(key) + 4 + 8
        return raw[:at] + new + raw[at + len(new) :]

    return spoil


def at(offset: int, form: str, number: int) -> Callable[[bytes], bytes]:
    """Write a number over the header."""
    return lambda raw: (
        raw[:offset] + struct.pack(form, number) + raw[offset + struct.calcsize(form) :]
    )


def tensor(field: int, form: str, number: int) -> Callable[[bytes], bytes]:
    """Write a number into the first tensor's entry: at 4 its sizes, at 20 type, at 24 offset."""

    def spoil(raw: bytes) -> bytes:
        start = raw.index(b"token_embd.weight") + len(b"token_embd.weight")
        return at(start + field, form, number)(raw)

    return spoil


@dataclass(frozen=True)
class File:
    name: str
    spoil: Callable[[bytes], bytes]
    error: type[e.HfcoreError]
    words: str


FILES = [
    File("empty", lambda _: b"", e.ModelFileError, "not a GGUF file"),
    File("four bytes", lambda raw: raw[:4], e.ModelFileError, "cut short: the version"),
    File(
        "a picture",
        lambda _: b"\x89PNG\r\n\x1a\n" + bytes(500),
        e.ModelFileError,
        r"not a GGUF file \(starts with .*PNG",
    ),
    File(
        "a page of html",
        lambda _: b"<!doctype html>" * 90,
        e.ModelFileError,
        r"not a GGUF file \(starts with",
    ),
    File("cut in its metadata", lambda raw: raw[:700], e.ModelFileError, "at most 20 can follow"),
    File(
        "cut in its tensors",
        lambda raw: raw[: len(raw) // 2],
        e.ModelFileError,
        "cut short: tensor",
    ),
    File("version 99", at(4, "<I", 99), e.UnsupportedModelError, "v99.*v2 and v3"),
    File("2^60 tensors", at(8, "<Q", 1 << 60), e.ModelFileError, "says it has 11529"),
    File("2^60 metadata", at(16, "<Q", 1 << 60), e.ModelFileError, "says it has 11529"),
    File("a key of 2^63 bytes", at(24, "<Q", 1 << 63), e.ModelFileError, "cut short: a key"),
    File("a size of 2^60", tensor(4, "<Q", 1 << 60), e.ModelFileError, "token_embd"),
    File("a size of 0", tensor(4, "<Q", 0), e.ModelFileError, "token_embd"),
    File("an offset beyond the end", tensor(24, "<Q", 1 << 40), e.ModelFileError, "token_embd"),
    File("a crooked offset", tensor(24, "<Q", 1), e.ModelFileError, "token_embd"),
    File("an unknown type", tensor(20, "<I", 999), e.UnsupportedModelError, "999"),
    File(
        "an unknown architecture",
        value_of(b"general.architecture", b"llamb"),
        e.UnsupportedModelError,
        "llamb",
    ),
    File(
        "an unknown tokenizer",
        value_of(b"tokenizer.ggml.model", b"gpt9"),
        e.UnsupportedModelError,
        "gpt9",
    ),
    File(
        "an unknown pre-tokenizer",
        value_of(b"tokenizer.ggml.pre", b"gpt-9"),
        e.UnsupportedModelError,
        "gpt-9",
    ),
    File(
        "a tensor missing",
        lambda raw: raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"),
        e.ModelFileError,
        "ffn_up",
    ),
    File(
        "a tensor twice",
        lambda raw: raw.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"),
        e.ModelFileError,
        "blk.0.ffn_up.weight",
    ),
    File(
        "no layers' size",
        lambda raw: raw.replace(b"llama.block_count", b"llama.block_xxxxx"),
        e.ModelFileError,
        "block_count",
    ),
]


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_bad_model_file(case: File, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(case.spoil(tiny.read_bytes()))
    with soon(), pytest.raises(case.error, match=case.words) as caught:
        Engine(path)
    assert one_line(caught.value)


def test_every_cut_of_a_file_is_an_error_never_a_crash(tiny: Path, tmp_path: Path) -> None:
    raw = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *range(400, len(raw), 4001)]:
        path.write_bytes(raw[:size])
        with pytest.raises(e.ModelFileError):
            Engine(path)


def test_a_tokenizer_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for text in ("", "{", "[]", '{"model": {"type": "?"}}'):
        path.write_text(text)
        with pytest.raises((e.ModelFileError, e.UnsupportedModelError), match="tokenizer"):
            Tokenizer.from_path(path)


# openings


OPENINGS: list[tuple[str, Callable[[Path], Any], type[e.HfcoreError], str]] = [
    ("missing file", lambda _: Engine("/no/such.gguf"), e.ModelNotFoundError, "/no/such.gguf"),
    ("missing directory", lambda _: Engine("./none"), e.ModelNotFoundError, "none: no such file"),
    ("an empty name", lambda _: Engine(" "), e.InvalidRequestError, "a path or owner/name"),
    ("a name of nothing", lambda _: Engine("gpt2"), e.ModelNotFoundError, "owner/name"),
    ("cuda", lambda p: Engine(p, device="cuda"), e.UnsupportedModelError, "not supported yet"),
    ("device", lambda p: Engine(p, device="tpu"), e.UnsupportedModelError, "'tpu'"),
    ("no context", lambda p: Engine(p, context_size=0), e.InvalidRequestError, "context_size.*0"),
    ("no threads", lambda p: Engine(p, threads=0), e.InvalidRequestError, "threads.*0"),
    ("a typo", lambda p: Engine(p, thread=2), e.UnknownOptionError, "did you mean 'threads'"),
    ("two names", lambda p: Engine(p, n_ctx=1, context_size=2), e.InvalidRequestError, "same opt"),
    ("cache", lambda p: Engine(p, kv_cache_dtype="fp8"), e.InvalidRequestError, "'int8', got 'fp"),
    ("at the door", lambda p: _core.Engine(p, kv_cache_dtype="fp8"), e.InvalidRequestError, "int8"),
    ("reference", lambda p: Engine(p, device="reference", kv_cache_dtype="int8"),
     e.InvalidRequestError, "must be f16 on the reference device"),
    ("memory", lambda p: Engine(p, kv_cache_bytes=1 << 60), e.ModelTooLargeError, "bytes"),
    ("template", lambda p: Engine(p, chat_template=BROKEN_TEMPLATE), e.TemplateError, "line"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "act", "error", "words"), OPENINGS, ids=[o[0] for o in OPENINGS])
def test_a_bad_opening(
    tiny: Path, name: str, act: Callable[[Path], Any], error: type[e.HfcoreError], words: str
) -> None:
    with soon(), pytest.raises(error, match=words) as caught:
        act(tiny)
    assert one_line(caught.value)


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(
    tiny: Path, tmp_path: Path
) -> None:
    """One tensor says that it has a tebibyte; the file is sparse, and has it."""
    raw = bytearray(tiny.read_bytes())
    info = raw.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight")
    rows = (1 << 40) // 68
    struct.pack_into("<Q", raw, info + 12, rows)
    struct.pack_into("<Q", raw, info + 24, len(raw) // 32 * 32)  # behind all others
    path = tmp_path / "large.gguf"
    path.write_bytes(raw)
    try:
        os.truncate(path, 2 * len(raw) + 68 * rows)
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    with (
        soon(),
        pytest.raises(e.ModelTooLargeError, match=r"needs \d+ bytes, \d+ are free") as caught,
    ):
        Engine(path)
    assert caught.value.needed > 1 << 40 > caught.value.available > 0


# requests


NAN, INF = float("nan"), float("inf")
UNMET = {"title": "Unmet", "type": "object", "required": ["a"],
         "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}}  # fmt: skip
NEVER_ENDS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "parameters": parameters}}


def answer(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


ADD = tool({"type": "object", "properties": {"a": {"type": "integer"}}})
REQUESTS: list[tuple[Any, dict[str, Any], type[e.HfcoreError], str]] = [
    ([], {}, e.InvalidRequestError, "empty"),
    ("", {"add_special_tokens": False}, e.InvalidRequestError, "at least 1 token, got 0"),
    (None, {}, e.InvalidRequestError, "got NoneType"),
    (USER[0], {}, e.InvalidRequestError, "got dict"),
    ([1.5], {}, e.InvalidRequestError, "token id, got float"),
    ([-1], {}, e.InvalidRequestError, "-1"),
    ([10**6], {}, e.InvalidRequestError, "1000000"),
    ([{"content": "no role"}], {}, e.InvalidRequestError, "role"),
    ([USER[0], "text"], {}, e.InvalidRequestError, "message 1 must be an object"),
    ("word " * 9000, {}, e.ContextOverflowError, r"prompt has \d+ tokens, the context holds 2048"),
    ("x", {"max_tokens": 0}, e.InvalidRequestError, "max_tokens.*0"),
    ("x", {"max_tokens": -5}, e.InvalidRequestError, "max_tokens.*-5"),
    ("x", {"max_tokens": "many"}, e.InvalidRequestError, "max_tokens.*many"),
    ("x", {"max_new_tokens": 1.5}, e.InvalidRequestError, "max_tokens.*1.5"),
    ("x", {"temperature": -0.1}, e.InvalidRequestError, "temperature.*-0.1"),
    ("x", {"temperature": NAN}, e.InvalidRequestError, "temperature"),
    ("x", {"temperature": INF}, e.InvalidRequestError, "temperature"),
    ("x", {"top_p": 0}, e.InvalidRequestError, "top_p.*0"),
    ("x", {"top_p": 1.1}, e.InvalidRequestError, "top_p.*1.1"),
    ("x", {"top_p": NAN}, e.InvalidRequestError, "top_p"),
    ("x", {"top_k": -1}, e.InvalidRequestError, "top_k.*-1"),
    ("x", {"min_p": 2}, e.InvalidRequestError, "min_p.*2"),
    ("x", {"typical_p": 0}, e.InvalidRequestError, "typical_p.*0"),
    ("x", {"repetition_penalty": 0}, e.InvalidRequestError, "repetition_penalty.*0"),
    ("x", {"frequency_penalty": 9}, e.InvalidRequestError, "frequency_penalty.*9"),
    ("x", {"presence_penalty": -INF}, e.InvalidRequestError, "presence_penalty"),
    ("x", {"seed": -1}, e.InvalidRequestError, "seed.*-1"),
    ("x", {"stop": [5]}, e.InvalidRequestError, "stop.*5"),
    ("x", {"stop": [""]}, e.InvalidRequestError, "stop"),
    ("x", {"logit_bias": {"a": 1}}, e.InvalidRequestError, "logit_bias"),
    ("x", {"logit_bias": {10**7: 1}}, e.InvalidRequestError, "10000000"),
    ("x", {"logprobs": True, "top_logprobs": 99}, e.InvalidRequestError, "top_logprobs.*99"),
    ("x", {"logprobs": True, "top_logprobs": -1}, e.InvalidRequestError, "top_logprobs.*-1"),
    ("x", {"do_sample": False, "top_p": 0.5}, e.InvalidRequestError, "do_sample.*top_p"),
    ("x", {"n": 0}, e.InvalidRequestError, "n must be at least 1"),
    ("x", {"num_beams": 2}, e.InvalidRequestError, "beam search"),
    ("x", {"timeout": 0}, e.InvalidRequestError, "timeout.*0"),
    ("x", {"temprature": 1}, e.UnknownOptionError, "did you mean 'temperature'"),
    ("x", {"max_tokens": 1, "max_new_tokens": 2}, e.InvalidRequestError, "same option"),
    ("x", {"tool_choice": "nope"}, e.InvalidRequestError, "tool_choice"),
    ("x", {"tool_choice": "auto"}, e.InvalidRequestError, "tool_choice"),
    ("x", {"response_format": answer(UNMET)}, e.InvalidRequestError, "'a' is unsatisfiable"),
    ("x", {"response_format": answer(NEVER_ENDS)}, e.InvalidRequestError, "no text meets it"),
    (USER, {"tool_choice": "none"}, e.InvalidRequestError, "'none', but there are no tools"),
    (USER, {"tool_choice": "add", "tools": []}, e.InvalidRequestError, "but there are no tools"),
    (USER, {"tool_choice": "ad", "tools": [ADD]}, e.InvalidRequestError, 'no tool is named "ad"'),
    (USER, {"tools": [ADD, ADD]}, e.InvalidRequestError, 'two are named "add"'),
    (USER, {"tools": [tool(UNMET)]}, e.InvalidRequestError, "'a' is unsatisfiable"),
    ([1], {"tool_style": "hermes"}, e.InvalidRequestError, "tool_style.*messages only"),
]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    with Engine(tiny) as opened:
        yield opened


def ids(case: Any) -> str:
    return f"{case!r:.30}"


@pytest.mark.parametrize(("prompt", "options", "error", "words"), REQUESTS, ids=ids)
def test_a_bad_request(
    engine: Engine, prompt: Any, options: dict[str, Any], error: type[e.HfcoreError], words: str
) -> None:
    with soon(), pytest.raises(error, match=words) as caught:
        engine.stream(prompt, **options)
    assert one_line(caught.value)
    assert engine.generate("x", max_tokens=1).usage is not None


@pytest.mark.parametrize(("prompt", "options", "error", "words"), REQUESTS, ids=ids)
async def test_the_same_bad_request_in_asyncio(
    engine: Engine, prompt: Any, options: dict[str, Any], error: type[e.HfcoreError], words: str
) -> None:
    with pytest.raises(error, match=words):
        await engine.agenerate(prompt, **options)


@pytest.mark.parametrize("case", [r for r in REQUESTS if r[0] == "x"], ids=ids)
def test_the_same_bad_option_through_langchain(tiny: Path, case: Any) -> None:
    _, options, error, words = case
    for model in (ChatHuggingFace(model=tiny), HuggingFacePipeline(model=tiny)):
        with soon(), pytest.raises(error, match=words):
            model.invoke("x", **options)
        with soon(), pytest.raises(error, match=words):
            next(model.stream("x", **options))


def test_an_image_for_a_text_model_is_refused_by_name(tiny: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": "What is this?"}, image]
    with pytest.raises(e.InvalidRequestError, match=r"'image_url'.*text only") as caught:
        ChatHuggingFace(model=tiny).invoke([{"role": "user", "content": content}])
    assert "AAAA" not in str(caught.value)


def test_a_schema_that_nothing_meets_is_refused_however_it_is_asked_for(tiny: Path) -> None:
    chat = ChatHuggingFace(model=tiny)
    for method in ("json_schema", "function_calling"):
        asked = chat.with_structured_output(UNMET, method=method)
        with soon(), pytest.raises(e.InvalidRequestError, match="'a' is unsatisfiable"):
            asked.invoke("x")
    with pytest.raises(e.InvalidRequestError, match="'a' is unsatisfiable"):
        chat.bind_tools([UNMET]).invoke("x")


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "5", 5, [1]])
@pytest.mark.parametrize("form", ["openai", "langchain"])
def test_a_call_in_a_history_whose_arguments_are_no_object_is_named(
    tiny: Path, arguments: Any, form: str
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    flat = {"id": "c1", "type": "tool_call", "name": "add", "args": arguments}
    calls = [call if form == "openai" else flat]
    history: list[Any] = [*USER, {"role": "assistant", "content": "", "tool_calls": calls}]
    words = f"message 1: the arguments of call 'add' are no JSON object, got {arguments!r}"
    with pytest.raises(e.InvalidRequestError, match=re.escape(words)) as caught:
        ChatHuggingFace(model=tiny).invoke(history)
    assert one_line(caught.value)


def test_a_call_that_langchain_cannot_read_is_named_not_dropped(tiny: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": 5}}
    unread = AIMessage("", additional_kwargs={"tool_calls": [call]})
    assert (unread.tool_calls, unread.invalid_tool_calls) == ([], [])
    with pytest.raises(e.InvalidRequestError, match="arguments of call 'add' are no JSON object"):
        ChatHuggingFace(model=tiny).invoke([HumanMessage("x"), unread])


def test_a_call_that_the_model_broke_goes_back_to_it_as_it_was(tiny: Path) -> None:
    """Not an error: LangChain keeps it apart as invalid, and the caller did not write it."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": '}}
    broken = AIMessage("", additional_kwargs={"tool_calls": [call]})
    [kept] = broken.invalid_tool_calls
    assert kept["args"] == '{"a": '
    chat = ChatHuggingFace(model=tiny, max_tokens=2)
    assert chat.invoke([HumanMessage("x"), broken, HumanMessage("Again")]).usage_metadata


def test_what_is_for_chats_is_refused_of_a_text_by_its_name(tiny: Path) -> None:
    for asked in ({"tool_style": "hermes"}, {"tool_choice": "auto"}, {"reasoning": True}):
        words = f"unknown option '{next(iter(asked))}'; it belongs to a chat's request"
        for ask in (
            lambda asked=asked: HuggingFacePipeline(model=tiny, **asked),
            lambda asked=asked: HuggingFacePipeline(model=tiny).invoke("x", **asked),
        ):
            with pytest.raises(e.UnknownOptionError, match=words):
                ask()


# templates


def test_a_template_that_cannot_be_parsed_names_itself_and_the_line() -> None:
    with pytest.raises(e.TemplateError, match=r'"mine", line 3') as caught:
        ChatTemplate(BROKEN_TEMPLATE, name="mine")
    assert (caught.value.name, caught.value.thrown) == ("mine", False)
    assert caught.value.line == 3


def test_a_template_that_refuses_says_where(tiny: Path) -> None:
    with (
        Engine(tiny, chat_template=THROWING_TEMPLATE) as engine,
        pytest.raises(e.TemplateError, match=r"line 2.*not like this") as caught,
    ):
        engine.generate(USER)
    assert (caught.value.line, caught.value.thrown) == (2, True)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 10**11 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_template_ends(source: str) -> None:
    with pytest.raises(e.TemplateError):
        ChatTemplate(source).render(USER)


def test_a_chat_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, chat_template=None)
    with Engine(path) as engine, pytest.raises(e.NoChatTemplateError, match="pass chat_template="):
        engine.generate(USER)
    with pytest.raises(e.NoChatTemplateError):
        ChatHuggingFace(model=path).invoke("Hello")
    assert HuggingFacePipeline(model=path, max_tokens=2).invoke("Hello")


# afterwards


def test_after_all_of_it_no_thread_is_left(tiny: Path, tmp_path: Path) -> None:
    def threads() -> int:
        return len(list(TASKS.iterdir())) if TASKS.is_dir() else 0

    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny.read_bytes()[:5000])

    def spoil_a_day() -> None:
        with pytest.raises(e.ModelFileError):
            Engine(bad)
        with Engine(tiny) as engine:
            for prompt, options, error, _ in REQUESTS:
                with pytest.raises(error):
                    engine.generate(prompt, **options)

    spoil_a_day()
    before = threads()
    for _ in range(3):
        spoil_a_day()
    deadline = time.monotonic() + SOON
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() <= before


def one_line(error: e.HfcoreError) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and not text.endswith(".")


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """What is inside must be over within SOON seconds."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON
