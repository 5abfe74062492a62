"""backend="transformers": the user's own pipeline behind the same interface."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from tiny_checkpoint import VOCAB, weights, write_checkpoint

from hfcore import ChatHuggingFace, Engine, HuggingFacePipeline
from hfcore._core import ChatTemplate, Turn
from hfcore.errors import (
    ContextOverflowError,
    InvalidRequestError,
    ModelNotFoundError,
    NoChatTemplateError,
    RequestTimeoutError,
    UnknownOptionError,
    UnsupportedModelError,
)
from hfcore.testing import CHATML

INSTALLED = all(importlib.util.find_spec(name) for name in ("transformers", "torch"))
needs_torch = pytest.mark.skipif(
    not INSTALLED, reason="needs transformers and torch: pip install 'hfcore[transformers]'"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), weights())


@pytest.fixture(scope="module")
def llm(base: Path) -> HuggingFacePipeline:
    return HuggingFacePipeline.from_model_id(
        str(base), "text-generation", backend="transformers", device="cpu"
    )


def tokens(llm: HuggingFacePipeline, **options: Any) -> list[int]:
    return [i for delta in llm.backend.stream("Hello", None, options) for i in delta.token_ids]


# Without torch ------------------------------------------------------------------------------------


def test_what_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    with pytest.raises(UnsupportedModelError, match=r"torch.*pip install 'hfcore\[transformers\]'"):
        HuggingFacePipeline.from_model_id("m", "text-generation", backend="transformers")


def test_an_architecture_nobody_knows_names_the_nearest_and_this_backend(
    base: Path, tmp_path: Path
) -> None:
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(base / name)
    with pytest.raises(UnsupportedModelError) as raised:
        Engine(tmp_path)
    message = str(raised.value)
    assert "'lama'" in message.replace('"', "'")
    assert "nearest is" in message
    assert "transformers" in message


def test_a_turn_reads_calls_and_stops() -> None:
    template = ChatTemplate(CHATML)
    turn = Turn([{"role": "user", "content": "1 + 1?"}], {"tools": [TOOL]}, template=template)
    assert "add" in turn.prompt
    calls: list[Any] = []
    text = ""
    for piece in ["So <tool", '_call>\n{"name": "add", "argu', 'ments": {"a": 1}}\n</tool_call>']:
        out = turn.push(piece)
        text += out[0]
        calls += out[2]
    calls += turn.finish()[2]
    assert turn.called
    assert text.strip() == "So"
    assert "".join(arguments for *_, arguments in calls) == '{"a": 1}'
    assert next(name for _, _, name, _ in calls) == "add"


def test_defaults_are_those_of_the_generation_config() -> None:
    config = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 7}
    options = Turn("x", {"top_p": 0.5}, generation_config=config).options
    assert (options["do_sample"], options["temperature"], options["max_tokens"]) == (True, 0.6, 7)
    assert Turn("x", {"temperature": 0}, generation_config=config).options["do_sample"] is False


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "a"},
        {"response_format": {"type": "json_object"}},
        {"tools": [TOOL], "tool_choice": "required"},
        {"priority": 3},
        {"adapter": "a"},
    ],
)
def test_what_cannot_act_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        Turn([{"role": "user", "content": "x"}], options, template=ChatTemplate(CHATML))


# With it ------------------------------------------------------------------------------------------


@needs_torch
def test_greedy_answers_are_those_of_our_own_engine(base: Path, llm: HuggingFacePipeline) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0}
    own = HuggingFacePipeline(model_id=str(base), model_kwargs={"device": "reference"})
    assert llm.invoke("Hello", **asked) == own.invoke("Hello", **asked)
    chat, ours = ChatHuggingFace(llm=llm), ChatHuggingFace(llm=own)
    one, other = chat.invoke("Hi", **asked), ours.invoke("Hi", **asked)
    assert one.content == other.content
    assert one.usage_metadata == other.usage_metadata
    assert one.response_metadata["finish_reason"] == other.response_metadata["finish_reason"]
    assert llm.get_token_ids("Hello") == own.get_token_ids("Hello")
    assert chat.get_num_tokens_from_messages([one]) == ours.get_num_tokens_from_messages([one])


@needs_torch
def test_streams_come_token_by_token_and_sum_to_the_answer(llm: HuggingFacePipeline) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    deltas = list(llm.backend.stream("Hello", None, {"max_tokens": 12, "ignore_eos": True}))
    assert [len(delta.token_ids) for delta in deltas] == [1] * 12 + [0]
    last = deltas[-1]
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 12)
    assert "".join(delta.text for delta in deltas) == llm.invoke("Hello", **asked)


@needs_torch
async def test_async_streams_do_not_block_the_loop(llm: HuggingFacePipeline) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    asked: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
    texts = [chunk async for chunk in llm.astream("Hello", **asked)]
    ticking.cancel()
    assert "".join(texts) == llm.invoke("Hello", **asked)
    assert ticks > 3
    both = await llm.abatch(["Hello", "Good"], **asked)
    assert both == [llm.invoke("Hello", **asked), llm.invoke("Good", **asked)]


@needs_torch
def test_a_stop_string_ends_the_answer_across_tokens(llm: HuggingFacePipeline) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    whole = llm.invoke("Hello", **asked)
    at = len(whole) // 2
    stop = whole[at : at + 3]
    assert llm.invoke("Hello", **asked, stop=[stop]) == whole[: whole.index(stop)]


@needs_torch
def test_a_closed_stream_ends_its_generation(llm: HuggingFacePipeline) -> None:
    stream = llm.backend.stream("Hello", None, {"max_tokens": 500, "ignore_eos": True})
    next(stream)
    stream.close()
    end = time.monotonic() + 10
    while any(thread.name == "hfcore-transformers" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


@needs_torch
def test_seeds_repeat_and_leave_torch_alone(llm: HuggingFacePipeline) -> None:
    import torch

    asked: dict[str, Any] = {"max_tokens": 16, "temperature": 1.3, "ignore_eos": True}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = llm.invoke("Hello", **asked, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert llm.invoke("Hello", **asked, seed=4) == one
    assert llm.invoke("Hello", **asked, seed=5) != one
    answers = ChatHuggingFace(llm=llm).generate([[HumanMessage("Hi")]], n=2, seed=4, **asked)
    texts = [generation.text for generation in answers.generations[0]]
    assert len(set(texts)) == 2


@needs_torch
def test_every_option_acts(base: Path, llm: HuggingFacePipeline) -> None:
    plain: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    own = HuggingFacePipeline(model_id=str(base), model_kwargs={"device": "reference"})
    changes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"logit_bias": {65: 100}},
    ]
    for options in changes:
        got = llm.invoke("Hello", **plain, **options)
        assert got == own.invoke("Hello", **plain, **options) != llm.invoke("Hello", **plain)
    drawn: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.5, "seed": 1}
    drawn["ignore_eos"] = True
    changes = [{"top_k": 1}, {"top_p": 0.001}, {"min_p": 1.0}]
    for options in changes:
        assert llm.invoke("Hello", **drawn, **options) == llm.invoke("Hello", **plain)
    assert llm.invoke("Hello", **drawn, typical_p=0.1) != llm.invoke("Hello", **drawn)
    ended = list(llm.backend.stream("Hello", None, {"logit_bias": {VOCAB - 1: 100}}))
    assert (ended[-1].finish_reason, len(ended)) == ("stop", 2)
    some = {"logit_bias": {VOCAB - 1: 100}, "min_tokens": 3, "max_tokens": 9}
    assert len(list(llm.backend.stream("Hello", None, some))) == 5


@needs_torch
def test_logprobs_are_those_of_our_own_engine(base: Path, llm: HuggingFacePipeline) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    options |= {"temperature": 0, "ignore_eos": True}
    deltas = list(llm.backend.stream("Hello", None, options))[:-1]
    with Engine(base, device="reference") as engine:
        ours = list(engine.stream("Hello", **options))
    for delta, our in zip(deltas, ours, strict=True):
        assert delta.logprobs is not None
        assert our.logprobs is not None
        [one], [other] = delta.logprobs, our.logprobs
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [i for i, _, _ in one.top] == [i for i, _, _ in other.top]


@needs_torch
def test_an_existing_pipeline_is_run_as_it_was_made(base: Path) -> None:
    import transformers

    pipeline = transformers.pipeline(
        "text-generation", model=str(base), device="cpu", max_new_tokens=5, do_sample=False
    )
    llm = HuggingFacePipeline(pipeline=pipeline)
    assert llm.model_id == str(base)
    assert tokens(llm, ignore_eos=True) == tokens(llm, ignore_eos=True, max_tokens=5)
    wanted = pipeline("Hello", return_full_text=False)[0]["generated_text"]
    assert llm.invoke("Hello") == wanted
    assert ChatHuggingFace(llm=llm).invoke("Hi").usage_metadata is not None
    other = transformers.pipeline("text-generation", model=str(base), device="cpu")
    identity = llm.backend.identity()
    assert identity == HuggingFacePipeline(pipeline=pipeline).backend.identity()
    assert identity != HuggingFacePipeline(pipeline=other).backend.identity()
    beams = transformers.pipeline("text-generation", model=str(base), device="cpu", num_beams=3)
    with pytest.raises(InvalidRequestError, match="num_beams=3"):
        HuggingFacePipeline(pipeline=beams)
    with pytest.raises(InvalidRequestError, match="exists already"):
        HuggingFacePipeline(pipeline=pipeline, device="cpu")
    with pytest.raises(InvalidRequestError, match="got object"):
        HuggingFacePipeline(pipeline=object())


@needs_torch
def test_tools_are_told_and_read(llm: HuggingFacePipeline) -> None:
    chat = ChatHuggingFace(llm=llm)
    bound = chat.bind_tools([TOOL], max_tokens=5, temperature=0)
    assert bound.invoke("1 + 1?").usage_metadata["input_tokens"] > 60  # type: ignore[index]
    with pytest.raises(InvalidRequestError, match="needs a grammar"):
        chat.bind_tools([TOOL], tool_choice="any").invoke("1 + 1?")
    with pytest.raises(InvalidRequestError, match="needs a grammar"):
        chat.with_structured_output(TOOL["function"]).invoke("1 + 1?")
    assert chat.profile is not None
    assert chat.profile["structured_output"] is False


@needs_torch
def test_what_only_transformers_knows_goes_there(base: Path) -> None:
    llm = HuggingFacePipeline.from_model_id(
        str(base), "text-generation", backend="transformers", device_map="cpu",
        model_kwargs={"dtype": "float32", "attn_implementation": "eager"},
        pipeline_kwargs={"max_new_tokens": 30, "temperature": 0, "no_repeat_ngram_size": 2},
    )  # fmt: skip
    ids = tokens(llm, max_tokens=30, ignore_eos=True)
    pairs = list(itertools.pairwise(ids))
    assert len(pairs) == len(set(pairs)) == 29
    assert llm.backend.opened().model.config._attn_implementation == "eager"  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(llm.backend))
    assert again.identity() == llm.backend.identity()
    with pytest.raises(UnknownOptionError, match="did you mean"):
        HuggingFacePipeline(
            model_id=str(base), backend="transformers", pipeline_kwargs={"max_nw_tokens": 3}
        )


@needs_torch
def test_errors_are_ours(base: Path, llm: HuggingFacePipeline, tmp_path: Path) -> None:
    with pytest.raises(ContextOverflowError, match="the context holds 512"):
        llm.invoke("x" * 600)
    with pytest.raises(RequestTimeoutError):
        llm.invoke("x", max_new_tokens=400, ignore_eos=True, timeout=0.02)
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.invoke("x", temperature=-1)
    missing = HuggingFacePipeline(model_id=str(tmp_path / "nothing"), backend="transformers")
    with pytest.raises(ModelNotFoundError):
        missing.invoke("x")
    plain = write_checkpoint(tmp_path / "plain", weights(), chat_template=None)
    chat = ChatHuggingFace.from_model_id(str(plain), backend="transformers")
    with pytest.raises(NoChatTemplateError):
        chat.invoke("x")
    with pytest.raises(InvalidRequestError, match="backend must be one of"):
        HuggingFacePipeline(model_id="m", backend="openvino")
