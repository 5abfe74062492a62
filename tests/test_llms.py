"""HuggingFacePipeline: the text interface of LangChain."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler

from hfcore import Engine, HuggingFacePipeline
from hfcore.errors import InvalidRequestError, UnknownOptionError, UnsupportedModelError
from hfcore.testing import Canned, tiny_model

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def canned(*answers: Any, **kwargs: Any) -> tuple[HuggingFacePipeline, Canned]:
    llm = HuggingFacePipeline(model_id="owner/canned", **kwargs)
    backend = Canned(*answers)
    llm._backend = backend
    return llm, backend


@pytest.fixture(scope="module")
def llm(tiny: Path) -> HuggingFacePipeline:
    return HuggingFacePipeline.from_model_id(
        str(tiny), "text-generation", device=-1, pipeline_kwargs=GREEDY, batch_size=2
    )


def test_the_completion_is_the_engines_and_does_not_echo(
    llm: HuggingFacePipeline, tiny: Path
) -> None:
    with Engine(tiny) as engine:
        expected = engine.generate("Once upon", max_tokens=6, temperature=0).text
    assert llm.invoke("Once upon") == expected
    assert "".join(llm.stream("Once upon")) == expected
    assert asyncio.run(llm.ainvoke("Once upon")) == expected
    assert llm.invoke("Once upon", return_full_text=True) == f"Once upon{expected}"
    assert llm.invoke("Once upon", skip_prompt=False) == f"Once upon{expected}"
    assert "".join(llm.stream("Once upon", return_full_text=True)) == f"Once upon{expected}"


async def test_async_streams_and_batches_are_the_same(llm: HuggingFacePipeline) -> None:
    prompts: list[Any] = [f"Number {n}" for n in range(5)]
    alone = [llm.invoke(prompt) for prompt in prompts]
    assert llm.batch(prompts) == alone
    assert await llm.abatch(prompts) == alone
    assert [g[0].text for g in llm.generate(prompts).generations] == alone
    assert "".join([chunk async for chunk in llm.astream(prompts[0])]) == alone[0]
    events = [e async for e in llm.astream_events(prompts[0], version="v2")]
    streamed = [e["data"]["chunk"] for e in events if e["event"] == "on_llm_stream"]
    assert "".join(map(str, streamed)) == alone[0]


def test_a_result_says_why_it_ended_and_what_it_took(llm: HuggingFacePipeline) -> None:
    result = llm.generate(["Hello", "Hi"], ignore_eos=True)
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["finish_reason"] == "length"
    assert info["usage"]["completion_tokens"] == 6
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["completion_tokens"] == 12
    assert result.llm_output["model_name"] == llm.model_id


def test_tokens_are_counted_by_the_models_tokenizer(llm: HuggingFacePipeline, tiny: Path) -> None:
    with Engine(tiny) as engine:
        ids = engine.tokenizer.encode("the end", add_special_tokens=False)
    assert llm.get_token_ids("the end") == [int(i) for i in ids]
    assert llm.get_num_tokens("the end") == len(ids)
    own = HuggingFacePipeline(model_id=str(tiny), custom_get_token_ids=lambda _: [1, 2, 3])
    assert own.get_num_tokens("the end") == 3


def test_only_batch_size_prompts_are_in_the_engine_at_a_time() -> None:
    class Counting(Canned):
        running = most = 0

        def stream(self, *args: Any) -> Any:
            inner = super().stream(*args)
            self.running += 1
            self.most = max(self.most, self.running)

            class Counted:
                def __iter__(self) -> Any:
                    yield from inner
                    outer.running -= 1

                def close(self) -> None:
                    inner.close()

            outer = self
            return Counted()

    llm, _ = canned(batch_size=3)
    backend = Counting("a b")
    llm._backend = backend
    llm.batch(["p"] * 8)
    assert (backend.most, len(backend.requests)) == (3, 8)


def test_one_failure_closes_the_other_requests() -> None:
    llm, backend = canned("a b c", ValueError("broken"), batch_size=2)
    with pytest.raises(ValueError, match="broken"):
        llm.generate(["x", "y"])
    assert backend.closed == 1


def test_leaving_a_stream_closes_the_request() -> None:
    llm, backend = canned("a b c")
    for _ in llm.stream("x"):
        break
    assert backend.closed == 1


@pytest.mark.parametrize(
    ("constructor", "call", "asked"),
    [
        ({"pipeline_kwargs": {"max_new_tokens": 5}}, {}, {"max_tokens": 5}),
        ({"model_kwargs": {"temperature": 0.5}}, {}, {"temperature": 0.5}),
        ({"top_p": 0.5}, {}, {"top_p": 0.5}),
        ({"top_p": 0.5}, {"top_p": 0.7}, {"top_p": 0.7}),
        ({"max_tokens": 5}, {"pipeline_kwargs": {"max_new_tokens": 9}}, {"max_tokens": 9}),
        ({"stop_sequences": ["x"]}, {"stop": ["y"]}, {"stop": ["y"]}),
        ({"stop": "x"}, {}, {"stop": ["x"]}),
        ({"do_sample": False}, {"temperature": 0.3}, {"temperature": 0.3}),
    ],
)
def test_options_reach_the_engine_from_wherever_they_are_given(
    constructor: dict[str, Any], call: dict[str, Any], asked: dict[str, Any]
) -> None:
    llm, backend = canned(**constructor)
    llm.invoke("x", **call)
    list(llm.stream("x", **call))
    asyncio.run(llm.ainvoke("x", **call))
    assert [options for _, _, options in backend.requests] == [asked] * 3


def test_a_bound_option_gives_way_to_the_calls_by_any_name() -> None:
    llm, backend = canned(max_tokens=3)
    bound = llm.bind(max_tokens=5, seed=1)
    bound.invoke("x")
    bound.invoke("x", max_new_tokens=7)
    assert [o for _, _, o in backend.requests] == [
        {"max_tokens": 5, "seed": 1}, {"max_tokens": 7, "seed": 1},
    ]  # fmt: skip


def test_how_the_model_is_opened_reaches_the_engine(tiny: Path) -> None:
    llm = HuggingFacePipeline(model_id=str(tiny), model_kwargs={"n_ctx": 64}, threads=1)
    assert llm.model_kwargs == {"context_size": 64, "threads": 1}
    with pytest.raises(InvalidRequestError, match="the context holds 64"):
        llm.invoke("x" * 100)


def test_the_constructor_opens_nothing() -> None:
    HuggingFacePipeline(model_id="/no/such/model.gguf")


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({}, InvalidRequestError, "model_id is needed"),
        ({"model": "a.gguf", "model_id": "b.gguf"}, InvalidRequestError, "with different values"),
        ({"model": "m", "pipeline": object()}, InvalidRequestError, "a transformers pipeline"),
        ({"model": "m", "task": "summarization"}, InvalidRequestError, "must be one of text-gen"),
        ({"model": "m", "batch_size": 0}, InvalidRequestError, "batch_size: .*, got 0"),
        ({"model": "m", "batchsize": 2}, UnknownOptionError, "did you mean 'batch_size'"),
        ({"model": "m", "model_kwargs": {"thread": 1}}, UnknownOptionError, "mean 'threads'"),
        ({"model": "m", "pipeline_kwargs": {"temp": 1}}, UnknownOptionError, "'temp'"),
        (
            {"model": "m", "model_kwargs": {"torch_dtype": "f"}},
            InvalidRequestError,
            "of their file",
        ),
        ({"model": "m", "trust_remote_code": True}, InvalidRequestError, "never run"),
        ({"model": "m", "pipeline_kwargs": {"num_beams": 4}}, InvalidRequestError, "beam search"),
        ({"model": "m", "model_kwargs": 5}, InvalidRequestError, "expected a dict of options"),
        ({"model": "m", "device": 0}, UnsupportedModelError, "not supported yet"),
        ({"model": "m", "device_map": "cuda:0"}, UnsupportedModelError, "not supported yet"),
        ({"model": "m", "model_kwargs": {"device": "mps"}}, UnsupportedModelError, "'mps'"),
        ({"model": "m", "tools": [1]}, InvalidRequestError, "use bind_tools"),
    ],
)
def test_what_cannot_act_is_refused_by_the_constructor(
    kwargs: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        HuggingFacePipeline(**kwargs)


def test_a_backend_that_is_not_there_is_refused_with_those_that_are() -> None:
    known = "one of default, transformers, auto, got 'openvino'"
    with pytest.raises(InvalidRequestError, match=known):
        HuggingFacePipeline.from_model_id("m", "text-generation", backend="openvino")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"temprature": 1}, UnknownOptionError),
        ({"max_tokens": 1, "max_new_tokens": 2}, InvalidRequestError),
        ({"return_full_text": True, "skip_prompt": True}, InvalidRequestError),
        ({"num_beams": 2}, InvalidRequestError),
        ({"tools": [{}]}, InvalidRequestError),
    ],
)
def test_what_cannot_act_is_refused_by_the_call(
    call: dict[str, Any], error: type[Exception]
) -> None:
    llm, _ = canned()
    with pytest.raises(error):
        llm.invoke("x", **call)


def test_a_token_is_never_shown(tiny: Path) -> None:
    llm = HuggingFacePipeline(model_id=str(tiny), model_kwargs={"token": "hf_s3cret"})
    assert "s3cret" not in f"{llm!r} {llm} {llm._identifying_params} {llm.asdict()}"


def test_cache_keys_differ_whenever_answers_may(tiny: Path) -> None:
    variants: list[dict[str, Any]] = [
        {}, {"temperature": 0.5}, {"seed": 1}, {"context_size": 64}, {"chat_template": "x"},
        {"return_full_text": True}, {"stop": "x"},
    ]  # fmt: skip
    keys = {str(HuggingFacePipeline(model_id=str(tiny), **v)._identifying_params) for v in variants}
    assert len(keys) == len(variants)


async def test_a_cache_tells_the_options_of_calls_apart(tiny: Path) -> None:
    cache = InMemoryCache()
    llm = HuggingFacePipeline(model_id=str(tiny), cache=cache, max_tokens=8)
    calls: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0, "max_tokens": 3}, {"temperature": 0, "stop": [" "]},
        {"seed": 1, "temperature": 1}, {"seed": 2, "temperature": 1}, {"seed": 1, "temperature": 2},
        {"temperature": 0, "return_full_text": True}, {"temperature": 0, "regex": "[ab]+"},
    ]  # fmt: skip
    plain = HuggingFacePipeline(model_id=str(tiny), cache=False, max_tokens=8)
    expected = [plain.invoke("Once upon", **call) for call in calls]
    assert len(set(expected)) == len(calls)
    for _ in range(2):
        assert [llm.invoke("Once upon", **call) for call in calls] == expected
        assert [await llm.ainvoke("Once upon", **call) for call in calls] == expected
        assert [llm.bind(**call).invoke("Once upon") for call in calls] == expected
    assert len(cache._cache) == len(calls)
    # The same wish is the same answer, by whichever name and in whichever layer it is made.
    assert llm.bind(max_tokens=5).invoke("Once upon", max_new_tokens=3, do_sample=False)
    assert len(cache._cache) == len(calls) + 1
    with pytest.raises(UnknownOptionError, match="did you mean 'temperature'"):
        llm.invoke("Once upon", temprature=0)


def test_a_cache_gives_an_answer_once_made_and_never_another_models(tiny: Path) -> None:
    cache = InMemoryCache()
    llm, backend = canned("one", "two", cache=cache)
    assert [llm.invoke("x", seed=5) for _ in range(3)] == ["one"] * 3
    assert llm.invoke("x", seed=6) == "two"
    assert len(backend.requests) == 2
    second = tiny_model(tiny.parent, name="second", seed=7)
    answers = [
        HuggingFacePipeline(model=model, cache=cache).invoke("x", temperature=0, max_tokens=8)
        for model in (tiny, tiny, second, second)
    ]
    assert answers[0] == answers[1] != answers[2] == answers[3]


async def test_callbacks_learn_what_a_call_asks_for() -> None:
    class Heard(BaseCallbackHandler):
        params: list[Any]

        def on_llm_start(self, serialized: Any, prompts: Any, **kwargs: Any) -> None:
            self.params.append((kwargs["invocation_params"]["seed"], kwargs["options"]["stop"]))

    handler = Heard()
    handler.params = []
    llm, _ = canned(seed=1)
    config: Any = {"callbacks": [handler], "run_name": "named", "tags": ["t"]}
    llm.invoke("x", config, seed=2, stop_sequences="y")
    await llm.ainvoke("x", config, seed=3)
    assert handler.params == [(2, ["y"]), (3, None)]


def test_copies_and_pickles_answer_the_same(llm: HuggingFacePipeline) -> None:
    expected = llm.invoke("Hello")
    assert copy.deepcopy(llm).invoke("Hello") == expected
    assert pickle.loads(pickle.dumps(llm)).invoke("Hello") == expected


def test_tracing_gets_the_models_name(llm: HuggingFacePipeline) -> None:
    params = llm._get_ls_params(max_tokens=9)
    assert params["ls_model_name"] == llm.model_id
    assert (params["ls_provider"], params["ls_max_tokens"]) == ("huggingface", 9)


async def test_n_answers_are_n_generations_and_the_prompt_is_counted_once() -> None:
    llm, _ = canned("one two")
    for result in (llm.generate(["a", "b c"], n=2), await llm.agenerate(["a", "b c"], n=2)):
        assert [[g.text for g in answers] for answers in result.generations] == [
            ["one two"] * 2
        ] * 2
        assert result.llm_output is not None
        assert result.llm_output["token_usage"] == {
            "prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11,
        }  # fmt: skip
    with pytest.raises(InvalidRequestError, match="n=2 answers cannot be streamed"):
        list(llm.stream("a", n=2))
