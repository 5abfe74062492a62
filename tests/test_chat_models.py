"""ChatHuggingFace: the chat interface of LangChain, on a scripted backend and on the tiny model."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, load
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField

from hfcore import ChatHuggingFace, Delta, Engine, HuggingFacePipeline, TokenLogprob, Usage
from hfcore.errors import (
    InvalidRequestError,
    RequestTimeoutError,
    TemplateError,
    UnknownOptionError,
)
from hfcore.testing import CHATML, Canned, tiny_model

STRICT = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def canned(*answers: Any, **kwargs: Any) -> tuple[ChatHuggingFace, Canned]:
    chat = ChatHuggingFace(model="owner/canned", **kwargs)
    backend = Canned(*answers, model_name="owner/canned")
    chat.llm._backend = backend
    return chat, backend


@pytest.fixture(scope="module")
def chat(tiny: Path) -> ChatHuggingFace:
    return ChatHuggingFace(model=tiny, max_tokens=8, temperature=0)


def test_the_answer_is_the_engines(chat: ChatHuggingFace, tiny: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with Engine(tiny) as engine:
        done = engine.generate(messages, max_tokens=8, temperature=0)
    answer = chat.invoke("Hello")
    assert done.usage is not None
    assert answer.content == done.text
    assert answer.usage_metadata == {
        "input_tokens": done.usage.prompt_tokens,
        "output_tokens": done.usage.completion_tokens,
        "total_tokens": done.usage.total_tokens,
    }
    assert answer.response_metadata["finish_reason"] == done.finish_reason
    assert answer.response_metadata["model_name"] == str(tiny)
    assert answer.response_metadata["model_provider"] == "huggingface"


async def test_every_way_to_ask_gives_the_same_answer(chat: ChatHuggingFace) -> None:
    text = chat.invoke("Hello").content
    assert "".join(str(c.content) for c in chat.stream("Hello")) == text
    assert (await chat.ainvoke("Hello")).content == text
    assert "".join([str(c.content) async for c in chat.astream("Hello")]) == text
    assert [m.content for m in chat.batch(["Hello"] * 3)] == [text] * 3
    assert [m.content for m in await chat.abatch(["Hello"] * 3)] == [text] * 3
    assert chat.generate([[HumanMessage("Hello")]]).generations[0][0].text == text
    events = [e async for e in chat.astream_events("Hello", version="v2")]
    streamed = [e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"]
    assert "".join(streamed) == text


def test_a_stream_has_a_chunk_for_each_token_and_its_end_says_so() -> None:
    chat, _ = canned("Good day to you")
    *first, last = chat.stream("Hi")
    assert [c.content for c in first] == ["Good", " day", " to"]
    assert all(isinstance(c, AIMessageChunk) and c.usage_metadata is None for c in first)
    assert last.chunk_position == "last"
    assert last.usage_metadata is not None
    assert last.response_metadata["finish_reason"] == "stop"
    [whole] = [sum_of([*first, last])]
    invoked = chat.invoke("Hi")
    assert (whole.content, whole.usage_metadata) == (invoked.content, invoked.usage_metadata)
    assert whole.response_metadata["model_name"] == "owner/canned"


def sum_of(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


def test_usage_can_be_left_out_of_streams() -> None:
    off: dict[str, Any] = {"stream_usage": False}
    for kwargs, call in ((off, {}), ({}, off)):
        chat, backend = canned("a b", **kwargs)
        assert sum_of(list(chat.stream("Hi", **call))).usage_metadata is None
        assert backend.requests[0][2] == {}


def test_deltas_without_text_are_no_chunks_but_their_logprobs_are_kept() -> None:
    probability = TokenLogprob("a", 1, -0.5, ((1, "a", -0.5), (2, "b", -1.0)))
    deltas = [
        Delta("", (1,)), Delta("", (2,), (probability,)),
        Delta("a", (3,), (probability,), "stop", Usage(1, 3)),
    ]  # fmt: skip
    chat, backend = canned(deltas, logprobs=True, top_logprobs=2)
    chunks = list(chat.stream("Hi"))
    assert len(chunks) == 2
    expected = {
        "token": "a", "logprob": -0.5,
        "top_logprobs": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}],
    }  # fmt: skip
    assert sum_of(chunks).response_metadata["logprobs"] == {"content": [expected] * 2}
    assert chat.invoke("Hi").response_metadata["logprobs"] == {"content": [expected] * 2}
    assert backend.requests[0][2] == {"logprobs": True, "top_logprobs": 2}


def test_callbacks_get_every_token() -> None:
    class Tokens(BaseCallbackHandler):
        seen: list[str]

        def on_llm_new_token(self, token: Any, **_: Any) -> None:
            self.seen.append(str(token))

    handler = Tokens()
    handler.seen = []
    chat, _ = canned("one two three", streaming=True)
    chat.invoke("Hi", config={"callbacks": [handler]})
    assert handler.seen == ["one", " two", " three"]


OPTIONS: dict[str, Any] = {
    "temperature": 0.5, "max_tokens": 7, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9,
    "repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5,
    "logit_bias": {5: 1.0}, "seed": 3, "do_sample": True, "stop": ["x"], "ignore_eos": True,
    "logprobs": True, "top_logprobs": 2, "min_tokens": 2, "stop_token_ids": [4],
    "skip_special_tokens": False, "template_variables": {"a": 1}, "timeout": 5.0, "adapter": "a",
    "parse_special_in_content": True,
    "response_format": {"type": "json_object"}, "regex": "a+", "choice": ["a", "b"],
    "grammar": 'start: "a"', "parallel_tool_calls": False, "reasoning": True,
    "tool_style": "hermes", "n": 1, "priority": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_engine_from_field_binding_and_call(name: str) -> None:
    value = OPTIONS[name]
    by_field, field_backend = canned(**{name: value})
    by_field.invoke("x")
    by_call, call_backend = canned()
    by_call.invoke("x", **{name: value})
    list(by_call.stream("x", **{name: value}))
    asyncio.run(by_call.ainvoke("x", **{name: value}))
    by_call.bind(**{name: value}).invoke("x")
    asked = [o for _, _, o in field_backend.requests + call_backend.requests]
    assert asked == [{name: value}] * 5


def test_every_field_of_a_request_is_tested_above() -> None:
    elsewhere = {"documents", "add_generation_prompt", "continue_final_message", "tool_choice"}
    from hfcore.options import CHAT_REQUEST

    assert set(OPTIONS) == set(CHAT_REQUEST) - elsewhere


def test_options_of_the_template_reach_it(tiny: Path) -> None:
    template = (
        "{{ messages[-1].content }}|{{ mood }}|{{ documents | length if documents else 0 }}"
        "|{{ add_generation_prompt }}"
    )
    chat = ChatHuggingFace(model=tiny, chat_template=template, max_tokens=1)
    engine = chat.llm.backend.engine.get()  # type: ignore[attr-defined]  # Local
    call: dict[str, Any] = {
        "template_variables": {"mood": "glad"}, "documents": [{"title": "t", "text": "x"}],
        "add_generation_prompt": False,
    }  # fmt: skip
    answer = chat.invoke("Hi", **call)
    prompt = "Hi|glad|1|False"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == len(engine.tokenizer.encode(prompt))


def test_call_beats_binding_beats_field_beats_llm() -> None:
    llm = HuggingFacePipeline(
        model="owner/canned", pipeline_kwargs={"max_new_tokens": 1, "seed": 1}
    )
    chat = ChatHuggingFace(llm=llm)
    backend = Canned()
    llm._backend = backend
    chat.invoke("x")
    chat = ChatHuggingFace(llm=llm, max_tokens=2)
    chat.invoke("x")
    chat.bind(max_new_tokens=3).invoke("x")
    chat.bind(max_new_tokens=3).invoke("x", max_completion_tokens=4)
    asked = [o for _, _, o in backend.requests]
    assert asked == [{"max_tokens": n, "seed": 1} for n in (1, 2, 3, 4)]


def test_zero_is_a_value() -> None:
    llm = HuggingFacePipeline(model="m", pipeline_kwargs={"temperature": 0.8, "seed": 5})
    chat = ChatHuggingFace(llm=llm, temperature=0, seed=0)
    llm._backend = backend = Canned()
    chat.invoke("x")
    assert backend.requests[0][2] == {"temperature": 0, "seed": 0}


def test_what_langchain_passes_to_every_model_is_accepted() -> None:
    chat, backend = canned(max_retries=2, api_key="k3y", timeout=60, streaming=False)
    chat.invoke("x")
    assert "k3y" not in repr(chat)
    assert backend.requests[0][2] == {"timeout": 60}


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({}, InvalidRequestError, "model_id is needed"),
        ({"model": "m", "temprature": 0}, UnknownOptionError, "did you mean 'temperature'"),
        ({"model": "m", "max_tokens": "many"}, InvalidRequestError, "max_tokens: .*got 'many'"),
        ({"model": "m", "best_of": 2}, InvalidRequestError, "use n, and choose"),
        ({"model": "m", "tools": [{}]}, UnknownOptionError, "use bind_tools"),
        ({"model": "m", "response_format": 5}, InvalidRequestError, "response_format must be"),
        ({"model": "m", "tokenizer": object()}, InvalidRequestError, "comes with the model"),
        ({"llm": "gpt2"}, InvalidRequestError, "llm must be a HuggingFacePipeline.*got str"),
        ({"model": "m", "return_full_text": True}, UnknownOptionError, "return_full_text"),
        (
            {"model": "m", "pipeline_kwargs": {"return_full_text": True}},
            InvalidRequestError,
            "for text prompts",
        ),
    ],
)
def test_what_cannot_act_is_refused_by_the_constructor(
    kwargs: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ChatHuggingFace(**kwargs)


def test_an_llm_and_another_model_contradict() -> None:
    llm = HuggingFacePipeline(model="m")
    assert ChatHuggingFace(llm=llm, model_id="m").model_id == "m"
    with pytest.raises(InvalidRequestError, match="model='other' differs"):
        ChatHuggingFace(llm=llm, model="other")
    with pytest.raises(InvalidRequestError, match="threads belongs to llm"):
        ChatHuggingFace(llm=llm, threads=2)


def test_a_backend_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="got 'x'"):
        ChatHuggingFace.from_model_id("m", backend="x")


@pytest.mark.parametrize("name", ["functions", "function_call", "guided_json"])
def test_old_names_of_tools_are_refused_with_the_new_ones(name: str) -> None:
    chat, backend = canned()
    asked: dict[str, Any] = {name: ["x"]}
    for ask in (chat.invoke, chat.stream, chat.bind(**asked).invoke):
        with pytest.raises(InvalidRequestError, match=f"{name}=.*is not supported: use "):
            list(ask("x", **asked))
    assert backend.requests == []
    nothing: dict[str, Any] = {name: None}
    chat.invoke("x", **nothing)


def test_another_model_can_be_named_in_a_call(chat: ChatHuggingFace, tmp_path: Path) -> None:
    other = str(tiny_model(tmp_path, seed=3))
    answer = chat.invoke("Hello", model=other)
    assert answer.response_metadata["model_name"] == other
    assert (
        answer.content
        == ChatHuggingFace(model=other, max_tokens=8, temperature=0).invoke("Hello").content
    )
    assert chat._get_ls_params(model=other)["ls_model_name"] == other
    assert chat._get_invocation_params(model=other)["path"] == str(Path(other).resolve())


# conversations


def test_a_history_with_tools_goes_through_the_template(chat: ChatHuggingFace) -> None:
    call = {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"}
    history = [
        SystemMessage("s"), HumanMessage("1+1?"), AIMessage("", tool_calls=[call]),
        ToolMessage("2", tool_call_id="c1"),
    ]  # fmt: skip
    engine = chat.llm.backend.engine.get()  # type: ignore[attr-defined]  # Local
    prompt = (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = len(engine.tokenizer.encode(prompt, add_special_tokens=False))
    answer = chat.invoke(history)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == tokens
    assert chat.get_num_tokens_from_messages(history) == tokens


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke", "astream"])
def test_a_strict_template_gets_merged_and_folded_messages(tiny: Path, way: str) -> None:
    chat = ChatHuggingFace(model=tiny, chat_template=STRICT, max_tokens=2)
    conversation = [
        SystemMessage("S1"), SystemMessage("S2"), HumanMessage("a"), HumanMessage("b"),
        AIMessage("c"), AIMessage("d"), HumanMessage("e"),
    ]  # fmt: skip
    prompt = "[user]S1\n\nS2\n\na\n\nb[assistant]c\n\nd[user]e[assistant]"
    engine = chat.llm.backend.engine.get()  # type: ignore[attr-defined]  # Local
    expected = len(engine.tokenizer.encode(prompt, add_special_tokens=False))
    if way == "invoke":
        usage = chat.invoke(conversation).usage_metadata
    elif way == "stream":
        usage = sum_of(list(chat.stream(conversation))).usage_metadata
    elif way == "ainvoke":
        usage = asyncio.run(chat.ainvoke(conversation)).usage_metadata
    else:
        usage = asyncio.run(_astreamed(chat, conversation)).usage_metadata
    assert usage is not None
    assert usage["input_tokens"] == expected == chat.get_num_tokens_from_messages(conversation)


async def _astreamed(chat: ChatHuggingFace, conversation: list[Any]) -> AIMessageChunk:
    return sum_of([c async for c in chat.astream(conversation)])


def test_what_a_template_refuses_in_every_shape_is_its_first_error(tiny: Path) -> None:
    template = "{{ raise_exception('never ' ~ messages | length) }}"
    chat = ChatHuggingFace(model=tiny, chat_template=template)
    with pytest.raises(TemplateError, match="never 3") as caught:
        chat.invoke([SystemMessage("s"), HumanMessage("a"), HumanMessage("b")])
    assert caught.value.thrown


def test_a_broken_template_is_not_tried_twice(tiny: Path) -> None:
    chat = ChatHuggingFace(model=tiny, chat_template="{{ messages[0].content.nothing() }}")
    with pytest.raises(TemplateError) as caught:
        chat.invoke([SystemMessage("s"), HumanMessage("a")])
    assert not caught.value.thrown


# as LangChain's infrastructure sees it


def test_a_cache_never_mixes_models_or_options_up(tiny: Path, tmp_path: Path) -> None:
    cache = InMemoryCache()
    other = tiny_model(tmp_path, seed=5)
    chats = [
        ChatHuggingFace(model=model, cache=cache, max_tokens=8, temperature=0, **options)
        for model in (tiny, other)
        for options in ({}, {"repetition_penalty": 1.5}, {"chat_template": CHATML + " "})
    ]
    first = [chat.invoke("Hello").content for chat in chats]
    assert len(cache._cache) == len(chats)
    assert [chat.invoke("Hello").content for chat in chats] == first
    assert len(cache._cache) == len(chats)


def test_a_cache_tells_requests_with_other_tools_and_formats_apart() -> None:
    def add(a: int) -> int:
        """Add."""
        return a

    cache = InMemoryCache()
    chat, backend = canned("{}", cache=cache)
    asks: list[Any] = [
        chat, chat.bind_tools([add]), chat.bind_tools([add], tool_choice="any"),
        chat.bind_tools([add], parallel_tool_calls=False), chat.bind(max_tokens=3),
        chat.bind(response_format={"type": "json_object"}), chat.bind(model="owner/other"),
        chat.with_structured_output({"title": "A", "type": "object", "properties": {}}),
    ]  # fmt: skip
    chat._others["owner/other"] = backend.sibling("owner/other")
    for ask in asks * 2:
        ask.invoke("x")
    chat.invoke("x", tools=[add])
    chat.bind(timeout=9).invoke("x")
    assert len(cache._cache) == len(asks)


def test_a_model_file_that_changes_is_another_model(tmp_path: Path) -> None:
    path = tiny_model(tmp_path)
    before = ChatHuggingFace(model=path)._identifying_params
    tiny_model(tmp_path, context_size=1024)
    assert ChatHuggingFace(model=path)._identifying_params != before


def test_tracing_gets_what_ran() -> None:
    chat, _ = canned(temperature=0, max_tokens=5)
    assert chat._get_ls_params(stop=["x"], max_new_tokens=9) == {
        "ls_provider": "huggingface", "ls_model_type": "chat", "ls_model_name": "owner/canned",
        "ls_temperature": 0, "ls_max_tokens": 9, "ls_stop": ["x"],
    }  # fmt: skip


def test_copies_and_pickles_answer_the_same(chat: ChatHuggingFace) -> None:
    expected = chat.invoke("Hello").content
    assert copy.deepcopy(chat).invoke("Hello").content == expected
    assert pickle.loads(pickle.dumps(chat)).invoke("Hello").content == expected
    assert chat.model_copy(update={"max_tokens": 2}).invoke("Hello").usage_metadata is not None


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_langchain_writes_and_reads_it_without_secrets(chat: ChatHuggingFace) -> None:
    secret = "hf_s3cret"  # noqa: S105  # the test's own
    made = ChatHuggingFace(
        model=chat.model_id, max_tokens=8, temperature=0, api_key=secret, token=secret,
    )  # fmt: skip
    written = dumpd(made)
    assert written == dumpd(copy.deepcopy(made))
    assert written["id"] == ["hfcore", "chat_models", "ChatHuggingFace"]
    assert secret not in json.dumps(written)
    read = load(written, valid_namespaces=["hfcore"], allowed_objects="all")
    assert read._identifying_params == made._identifying_params
    assert read.invoke("Hello").content == chat.invoke("Hello").content
    assert "token" not in read.llm.model_kwargs
    again = load(
        written, valid_namespaces=["hfcore"], allowed_objects="all", secrets_map={"HF_TOKEN": "t"}
    )
    assert again.llm.model_kwargs["token"].get_secret_value() == "t"
    with pytest.raises(ValueError, match="Invalid namespace"):
        load(written, allowed_objects="all")


def test_a_profile_says_what_a_chat_model_can_do(tiny: Path) -> None:
    profile = ChatHuggingFace(model="owner/name", context_size=512).profile
    assert profile is not None
    assert profile["max_input_tokens"] == 512
    assert (profile["tool_calling"], profile["image_inputs"]) == (True, False)
    unopened = ChatHuggingFace(model="owner/other").profile
    assert unopened is not None
    assert "max_input_tokens" not in unopened
    own: Any = {"max_input_tokens": 7}
    assert ChatHuggingFace(model="m", profile=own).profile == own


def test_runnables_configure_retry_and_limit_it() -> None:
    chat, backend = canned("a b", max_tokens=4)
    chat.invoke("x")
    field = ConfigurableField(id="limit")
    chat.configurable_fields(max_tokens=field).invoke("x", {"configurable": {"limit": 9}})
    chat.with_retry(stop_after_attempt=2).invoke("x")
    chat.with_fallbacks([chat]).invoke("x")
    limiter = InMemoryRateLimiter(requests_per_second=1000, check_every_n_seconds=0.001)
    limited, _ = canned("a", rate_limiter=limiter)
    assert limited.invoke("x").content == "a"
    assert [o["max_tokens"] for _, _, o in backend.requests] == [4, 9, 4, 4]


# several answers


async def test_n_answers_are_n_generations_and_the_prompt_is_counted_once() -> None:
    chat, backend = canned("one two")
    messages: list[Any] = [HumanMessage("Hi")]
    for result in (chat.generate([messages], n=3), await chat.agenerate([messages], n=3)):
        generations = result.generations[0]
        assert [g.text for g in generations] == ["one two"] * 3
        own = generations[1].message.usage_metadata  # type: ignore[union-attr]  # of a chat
        assert own is not None
        prompt = own["input_tokens"]
        assert own["output_tokens"] == 2
        assert result.llm_output is not None
        assert result.llm_output["token_usage"] == {
            "prompt_tokens": prompt, "completion_tokens": 6, "total_tokens": prompt + 6,
        }  # fmt: skip
    assert backend.requests[0][2] == {"n": 3}
    both = chat.generate([messages, messages], n=3).llm_output
    assert both is not None
    assert both["token_usage"]["completion_tokens"] == 12
    chat, _ = canned("one", n=2)
    assert chat.invoke("Hi").content == "one"


async def test_several_answers_cannot_be_streamed() -> None:
    chat, backend = canned("one", n=2)
    with pytest.raises(InvalidRequestError, match="n=2 answers cannot be streamed"):
        list(chat.stream("Hi"))
    with pytest.raises(InvalidRequestError, match="n=2 answers cannot be streamed"):
        _ = [c async for c in chat.astream("Hi")]
    assert backend.requests == []
    one: dict[str, Any] = {"n": 1}
    assert len(list(chat.stream("Hi", **one))) == 1


def test_threads_may_share_a_model(chat: ChatHuggingFace) -> None:
    prompts = [f"Hello {n}" for n in range(16)]
    alone = [chat.invoke(prompt).content for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert [m.content for m in pool.map(chat.invoke, prompts)] == alone


def test_leaving_a_stream_closes_the_request() -> None:
    chat, backend = canned("a b c d")
    for _ in chat.stream("x"):
        break
    assert backend.closed == 1


async def test_cancelling_closes_the_request() -> None:
    chat, backend = canned("word " * 10_000)
    task = asyncio.create_task(chat.ainvoke("x"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.closed == 1


def test_a_timeout_ends_a_call(tiny: Path) -> None:
    chat = ChatHuggingFace(model=tiny, timeout=0.001, max_tokens=1900, ignore_eos=True)
    with pytest.raises(RequestTimeoutError):
        chat.invoke("Hello")


def test_tokens_are_counted_by_the_models_tokenizer(chat: ChatHuggingFace, tiny: Path) -> None:
    with Engine(tiny) as engine:
        ids = engine.tokenizer.encode("the end", add_special_tokens=False)
    assert chat.get_token_ids("the end") == [int(i) for i in ids]
    assert chat.get_num_tokens("the end") == len(ids)


@pytest.mark.parametrize("given", [5, [5], [{"role": "?!", "content": "x"}], [{"content": "x"}]])
def test_malformed_input_is_our_error(chat: ChatHuggingFace, given: Any) -> None:
    with pytest.raises(InvalidRequestError):
        chat.invoke(given)
