"""A model behind a server: what comes back becomes what a model here gives, and the token stays."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import trio
from huggingface_hub import constants
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import _common
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from pydantic import BaseModel
from servers import faults
from servers.loopback import Exchange
from servers.recording import Answer, Recording

from hfcore import ChatHuggingFace, HuggingFaceEndpoint
from hfcore.answers import Answer as Reading
from hfcore.connection import Clock, Connection, make
from hfcore.engine import Delta, ToolCall, total
from hfcore.errors import (
    InvalidRequestError,
    RemoteAuthenticationError,
    RemoteConnectionError,
    UnknownOptionError,
)
from hfcore.llms import totals
from hfcore.messages import to_dicts
from hfcore.remote import Remote
from hfcore.urls import is_hugging_face
from hfcore.wire import generation_parameters, wire_messages

TOKEN = "hf_a_secret_of_these_tests"  # noqa: S105  # nobody's
PNG = "aGVsbG8="


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture(autouse=True)
def _no_token_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "HF_INFERENCE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Recording]:
    with Recording(extensions=True) as server:
        yield server


@pytest.fixture
def say(server: Recording) -> Callable[..., ChatHuggingFace]:
    """A chat with the server, which will answer so."""

    def chat(*script: Any, **given: Any) -> ChatHuggingFace:
        server.script.extend(script)
        llm = HuggingFaceEndpoint(endpoint_url=f"{server.url}/v1", model="m", max_retries=0)
        return ChatHuggingFace(llm=llm, **given)

    return chat


def summed(chunks: Sequence[AIMessage]) -> AIMessageChunk:
    whole, *rest = [chunk for chunk in chunks if isinstance(chunk, AIMessageChunk)]
    for chunk in rest:
        whole += chunk
    return whole


# What an answer becomes ---------------------------------------------------------------------------


def test_a_stream_has_a_chunk_for_each_piece_and_its_end_says_so(
    say: Callable[..., ChatHuggingFace],
) -> None:
    chunks = list(say(Answer("Hello there", pieces=["Hel", "lo", " there"])).stream("Hi"))
    assert [chunk.content for chunk in chunks] == ["Hel", "lo", " there", ""]
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False] * 3 + [True]
    assert chunks[-1].chunk_position == "last"
    assert chunks[-1].response_metadata["finish_reason"] == "stop"


def test_an_answer_says_which_model_the_server_ran(say: Callable[..., ChatHuggingFace]) -> None:
    message = say(Answer("x", model="m-quantised")).invoke("Hi")
    assert message.response_metadata["model_name"] == "m-quantised"
    assert message.response_metadata["backend"] == "remote"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_thoughts_are_apart_from_text_under_either_name(
    say: Callable[..., ChatHuggingFace], field: str
) -> None:
    answer = Answer("42", reasoning="Let me see.", reasoning_field=field)
    chat = say(answer, answer)
    for message in (chat.invoke("Hi"), await chat.ainvoke("Hi")):
        assert message.content == "42"
        assert message.additional_kwargs["reasoning_content"] == "Let me see."
        kinds = [block["type"] for block in message.content_blocks]
        assert kinds == ["reasoning", "text"]


async def test_calls_stream_as_pieces_and_come_whole(say: Callable[..., ChatHuggingFace]) -> None:
    two = Answer(calls=[("add", '{"a": 1, "b": 2}'), ("add", '{"a": 3, "b": 4}')])
    chat = say(two, two, two).bind_tools([add], tool_choice="any")
    wanted = [("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})]
    streamed = summed([chunk async for chunk in chat.astream("1 + 2?")])
    for message in (chat.invoke("1 + 2?"), summed(list(chat.stream("1 + 2?"))), streamed):
        assert [(call["name"], call["args"]) for call in message.tool_calls] == wanted
        assert message.response_metadata["finish_reason"] == "tool_calls"
        assert len({call["id"] for call in message.tool_calls}) == 2


def test_the_only_tool_that_must_be_called_is_named(
    say: Callable[..., ChatHuggingFace], server: Recording
) -> None:
    def sent(tools: list[Any], **given: Any) -> Any:
        say().bind_tools(tools, tool_choice="any", **given).invoke("1 + 2?")
        return server.last.json["tool_choice"]

    assert sent([add]) == {"type": "function", "function": {"name": "add"}}
    assert sent([add], parallel_tool_calls=True) == "required"
    assert sent([add, Person]) == "required"


def test_a_call_whose_arguments_are_no_json_is_kept_as_invalid(
    say: Callable[..., ChatHuggingFace],
) -> None:
    message = say(Answer(calls=[("add", '{"a": 1')])).bind_tools([add]).invoke("Hi")
    assert message.tool_calls == []
    assert message.invalid_tool_calls[0]["args"] == '{"a": 1'


def test_several_answers_share_their_counts(say: Callable[..., ChatHuggingFace]) -> None:
    result = say(n=3).generate([[HumanMessage("Hi")]])
    assert len(result.generations[0]) == 3
    assert result.llm_output is not None
    counted = result.llm_output["token_usage"]
    assert counted["total_tokens"] == counted["prompt_tokens"] + counted["completion_tokens"]


async def test_log_probabilities_come_in_openai_form(say: Callable[..., ChatHuggingFace]) -> None:
    chat = say(Answer("Hello"), Answer("Hello"), top_logprobs=2)
    for message in (chat.invoke("Hi"), summed([c async for c in chat.astream("Hi")])):
        content = message.response_metadata["logprobs"]["content"]
        assert "".join(entry["token"] for entry in content) == "Hello"
        assert len(content[0]["top_logprobs"]) == 2


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("include_raw", [False, True])
def test_structured_output_gives_instances_by_every_method(
    say: Callable[..., ChatHuggingFace], method: Any, include_raw: bool
) -> None:
    written = '{"name": "Ada", "age": 36}'
    answer = (
        Answer(calls=[("Person", written)]) if method == "function_calling" else Answer(written)
    )
    chain = say(answer).with_structured_output(Person, method=method, include_raw=include_raw)
    found = chain.invoke("Who?")
    person = found["parsed"] if include_raw else found
    assert person == Person(name="Ada", age=36)


def test_the_history_of_calls_goes_back_as_the_server_gave_it(
    say: Callable[..., ChatHuggingFace], server: Recording
) -> None:
    chat = say(Answer(calls=[("add", '{"a": 1, "b": 2}')])).bind_tools([add])
    asked = HumanMessage("1 + 2?")
    called = chat.invoke([asked])
    result = ToolMessage("3", tool_call_id=called.tool_calls[0]["id"], name="add")
    chat.invoke([asked, called, result])
    sent = server.last.json["messages"]
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": 2}
    assert sent[2] == {"role": "tool", "tool_call_id": called.tool_calls[0]["id"], "content": "3"}


def test_thoughts_go_back_only_when_thoughts_are_asked_for() -> None:
    said = AIMessage("42", additional_kwargs={"reasoning_content": "Hm."})
    [dicts] = to_dicts([said])
    assert wire_messages([dicts]) == [{"role": "assistant", "content": "42"}]
    [kept] = wire_messages([dicts], thoughts=True)
    assert kept["reasoning_content"] == "Hm."


# Servers that write otherwise ---------------------------------------------------------------------


def read(*events: Any) -> Any:
    """The answer that a server's events are."""
    answer = Reading(Connection(model="m"), Clock(), logprobs=True)
    deltas = [delta for event in events for delta in answer.take(event)]
    return totals([*deltas, *answer.end()])[0]


def piece(*calls: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "delta": {"tool_calls": list(calls)}, "finish_reason": reason}]
    }


def call(arguments: Any, name: str | None = "f", **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **more}


END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        pytest.param(
            [piece(call("{", index=0, id="a")), piece(call("}", None, index=0))], ["{}"],
            id="as OpenAI does",
        ),
        pytest.param(
            [piece(call("{", index=0, id="a")), piece(call("}", index=0, id="a"))], ["{}"],
            id="name and id with every piece",
        ),
        pytest.param([piece(call("{", id="a")), piece(call("}", None))], ["{}"], id="no numbers"),
        pytest.param(
            [piece(call("{}", index=0, id="a")), piece(call("{}", index=0, id="b"))], ["{}", "{}"],
            id="all are number 0",
        ),
        pytest.param(
            [piece(call("{}", id="a")), piece(call("{}", id="b"))], ["{}", "{}"], id="by ids alone"
        ),
        pytest.param([piece(call({"x": 1}, index=0))], ['{"x": 1}'], id="an object, no id"),
        pytest.param(
            [{"choices": [{"index": 0, "message": {"tool_calls": [call("{}"), call("{}")]}}]}],
            ["{}", "{}"], id="whole, without number or id",
        ),
    ],
)  # fmt: skip
def test_calls_are_told_apart_however_a_server_numbers_them(
    events: list[Any], wanted: list[str]
) -> None:
    done = read(*events, END)
    assert [c.arguments for c in done.tool_calls] == wanted
    assert all(c.name == "f" and c.id for c in done.tool_calls)
    assert len({c.id for c in done.tool_calls}) == len(wanted)
    assert done.finish_reason == "tool_calls"


def test_text_in_parts_and_refusals_are_text() -> None:
    parts = {"delta": {"content": [{"type": "text", "text": "Hi"}], "refusal": "No."}, "index": 0}
    assert read({"choices": [parts]}, END).text == "HiNo."


def test_characters_that_a_server_cut_in_two_are_whole_again() -> None:
    def said(*pieces: str) -> str:
        events = [json.loads(f'{{"choices": [{{"delta": {{"content": "{p}"}}}}]}}') for p in pieces]
        text: str = read(*events, END).text
        return text

    assert said("a\\ud83d", "\\ude00b") == "a\U0001f600b"
    assert said("\\ud83d\\ude00", "\\ud83d", "x") == "\U0001f600\ufffdx"
    assert said("\\ude00") == "\ufffd"


def test_an_end_in_words_of_other_servers_is_ours() -> None:
    for theirs, ours in (("eos_token", "stop"), ("length", "length"), ("filtered", "filtered")):
        end = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": theirs}]}
        assert read(end).finish_reason == ours


def test_done_ends_an_answer_without_a_reason() -> None:
    said = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}
    assert read(said, "[DONE]").finish_reason == "stop"


def test_values_of_other_kinds_than_promised_are_left_out() -> None:
    odd = {"choices": [{"index": "x", "delta": {"content": 5, "tool_calls": "no"},
                        "logprobs": {"content": [{"token": None, "logprob": "x"}]}}],
           "usage": {"prompt_tokens": "many"}, "model": 7}  # fmt: skip
    done = read(odd, END)
    assert (done.text, done.usage) == ("", None)


@pytest.mark.parametrize("odd", [None, True, -1, 10**400, "x", [], [1], {}, {"id": 1}])
def test_no_value_of_any_field_brings_the_reader_down(odd: Any) -> None:
    top = {"token": "a", "logprob": odd, "top_logprobs": odd}
    more = {"token": "a", "logprob": -1, "top_logprobs": [{"token": odd, "logprob": odd}, odd]}
    choice = {
        "index": 0, "delta": {"content": odd, "tool_calls": [{"function": odd, "index": odd}]},
        "logprobs": {"content": [top, more]},
    }  # fmt: skip
    completion = {"text": odd, "logprobs": {"tokens": [odd], "token_logprobs": [odd],
                                            "top_logprobs": odd}}  # fmt: skip
    token = {"token": {"text": odd, "id": odd, "logprob": odd}, "top_tokens": odd}
    whole = {"generated_text": "x", "details": {"tokens": odd, "finish_reason": odd}}
    calls = {"choices": [{"message": {"tool_calls": odd}, "finish_reason": odd}]}
    counts = {"choices": [], "usage": odd, "model": odd, "system_fingerprint": odd}
    for event in ({"choices": [choice]}, {"choices": [completion]}, token, whole, calls, counts):
        read(event, counts, END, "[DONE]")


def test_a_server_without_streams_answers_as_well(say: Callable[..., ChatHuggingFace]) -> None:
    whole = {"model": "m", "choices": [{"index": 0, "finish_reason": "stop",
             "message": {"role": "assistant", "content": "Hello"}}],
             "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip
    message = say(faults.body(whole)).invoke("Hi")
    assert message.content == "Hello"
    assert message.usage_metadata == {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}


def test_a_text_of_a_server_without_streams_is_taken(server: Recording) -> None:
    server.script.append(faults.body([{"generated_text": " world"}]))
    assert HuggingFaceEndpoint(endpoint_url=server.url).invoke("Hello") == " world"


# Content parts ------------------------------------------------------------------------------------

URL = "https://example.org/x"
DATA = f"data:image/png;base64,{PNG}"
IMAGE = {"type": "image_url", "image_url": {"url": DATA}}


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        ({"type": "image", "base64": PNG, "mime_type": "image/png"}, IMAGE),
        ({"type": "image", "source_type": "base64", "data": PNG, "mime_type": "image/png"}, IMAGE),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
         IMAGE),
        (IMAGE, IMAGE),
        ({"type": "image_url", "image_url": DATA}, IMAGE),
        ({"type": "image", "url": URL}, {"type": "image_url", "image_url": {"url": URL}}),
        ({"type": "audio", "base64": PNG, "mime_type": "audio/mpeg"},
         {"type": "input_audio", "input_audio": {"data": PNG, "format": "mp3"}}),
        ({"type": "audio", "url": URL}, {"type": "audio_url", "audio_url": {"url": URL}}),
        ({"type": "video", "url": URL}, {"type": "video_url", "video_url": {"url": URL}}),
        ({"type": "file", "base64": PNG, "mime_type": "application/pdf", "filename": "a.pdf"},
         {"type": "file",
          "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PNG}"}}),
        ({"type": "file", "file_id": "f1"}, {"type": "file", "file": {"file_id": "f1"}}),
        ({"type": "file", "file": {"file_id": "f1"}}, {"type": "file", "file": {"file_id": "f1"}}),
    ],
)  # fmt: skip
def test_content_that_is_no_text_goes_out_in_openais_form(
    say: Callable[..., ChatHuggingFace], server: Recording, block: Any, wanted: Any
) -> None:
    say().invoke([HumanMessage([{"type": "text", "text": "Look:"}, block])])
    [message] = server.last.json["messages"]
    assert message["content"] == [{"type": "text", "text": "Look:"}, wanted]
    with pytest.raises(InvalidRequestError, match="reads text only"):
        to_dicts([HumanMessage([block])])


@pytest.mark.parametrize(
    "block", [{"type": "image"}, {"type": "file", "url": URL}, {"type": "image_url"}]
)
def test_a_part_that_the_api_has_no_form_for_is_refused_by_its_place(block: Any) -> None:
    with pytest.raises(InvalidRequestError, match="message 1"):
        to_dicts([HumanMessage("x"), HumanMessage([block])], parts=True)


def test_what_a_provider_cannot_take_is_its_error_shown(
    say: Callable[..., ChatHuggingFace],
) -> None:
    video = {"type": "video", "url": "ftp://example.org"}
    with pytest.raises(InvalidRequestError, match="video_url"):
        say().invoke([HumanMessage([video])])


# Texts --------------------------------------------------------------------------------------------


async def test_texts_stream_with_usage_on_every_route(server: Recording) -> None:
    for path in ("", "/v1"):
        llm = HuggingFaceEndpoint(endpoint_url=server.url + path, max_new_tokens=2)
        assert "".join(llm.stream("Hello world")) == " Hello"
        assert "".join([c async for c in llm.astream("Hello world")]) == " Hello"
        [[generation]] = (await llm.agenerate(["Hello world"])).generations
        info = generation.generation_info or {}
        assert info["finish_reason"] == "length"
        assert info["usage"]["completion_tokens"] == 2


def test_a_route_that_a_server_lacks_is_not_tried_again_and_others_are(server: Recording) -> None:
    llm = HuggingFaceEndpoint(endpoint_url=server.url)
    llm.invoke("Hi", min_p=0.1)  # TGI's own form has no place for it
    llm.invoke("Hi", truncate=5)  # and OpenAI's none for this
    assert [r.path for r in server.requests] == ["/v1/completions", "/"]
    server.only_chat = True
    server.requests.clear()
    other = HuggingFaceEndpoint(endpoint_url=server.url)
    assert [other.invoke("Hi") for _ in range(2)] == ["You said: Hi"] * 2
    paths = ["/", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions"]
    assert [r.path for r in server.requests] == paths


@pytest.mark.parametrize("task", ["text-generation", "conversational"])
async def test_a_text_goes_to_a_provider_in_the_form_that_it_has(
    server: Recording, monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    name = "together"
    known = InferenceProviderMapping(  # type: ignore[no-untyped-call]
        provider=name, hf_model_id="a/b", providerId="theirs", status="live", task=task
    )
    monkeypatch.setattr(_common, "_fetch_inference_provider_mapping", lambda _: [known])
    monkeypatch.setattr(constants, "INFERENCE_PROXY_TEMPLATE", f"{server.url}/{{provider}}")
    llm = HuggingFaceEndpoint(
        repo_id="a/b", provider=name, huggingfacehub_api_token=TOKEN, max_new_tokens=9, min_p=0.1
    )
    if task == "text-generation":
        with pytest.raises(InvalidRequestError, match="min_p"):  # some may have no place for it
            llm.invoke("Hi")
    llm = llm.model_copy(update={"min_p": None})
    said = " Hi" if task == "text-generation" else "You said: Hi"
    assert (llm.invoke("Hi"), await llm.ainvoke("Hi")) == (said, said)
    body = server.last.json
    assert (body["model"], body["max_tokens"], body["stream"]) == ("theirs", 9, False)
    assert ("prompt" in body) is (task == "text-generation")
    assert server.last.token == TOKEN


def test_prompts_of_one_batch_are_under_way_together(server: Recording) -> None:
    meeting = threading.Barrier(3, timeout=30)

    def meet(exchange: Exchange) -> None:
        meeting.wait()
        faults.body([{"generated_text": "x"}])(exchange)

    server.script.extend([meet] * 3)
    llm = HuggingFaceEndpoint(endpoint_url=server.url, batch_size=3)
    assert llm.batch(["a", "b", "c"]) == ["x"] * 3


def test_an_answer_may_begin_with_its_prompt(server: Recording) -> None:
    llm = HuggingFaceEndpoint(endpoint_url=server.url, return_full_text=True)
    assert llm.invoke("Hi") == "Hi Hi"
    assert "".join(llm.stream("Hi")) == "Hi Hi"
    assert "return_full_text" not in server.last.json["parameters"]


@pytest.mark.parametrize("streaming", [False, True])
async def test_callbacks_hear_of_tokens_when_streaming(server: Recording, streaming: bool) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    class Ear(BaseCallbackHandler):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_llm_new_token(self, token: Any, **_: Any) -> None:
            self.heard.append(token)

    llm = HuggingFaceEndpoint(endpoint_url=server.url, streaming=streaming)
    ears = [Ear(), Ear()]
    await asyncio.to_thread(lambda: llm.invoke("Hello", {"callbacks": [ears[0]]}))
    await llm.ainvoke("Hello", {"callbacks": [ears[1]]})
    assert ["".join(ear.heard) for ear in ears] == [" Hello" if streaming else ""] * 2


# Event loops --------------------------------------------------------------------------------------


async def test_requests_of_one_loop_run_together_and_leave_no_thread(
    say: Callable[..., ChatHuggingFace], server: Recording
) -> None:
    meeting = threading.Barrier(20, timeout=30)

    def meet(exchange: Exchange) -> None:
        meeting.wait()
        faults.bytewise("ok", 50)(exchange)

    chat = say(*[meet] * 20)
    before = {t for t in threading.enumerate() if "asyncio" in t.name or "AnyIO" in t.name}
    messages = await asyncio.gather(*(chat.ainvoke("Hi") for _ in range(20)))
    assert [m.content for m in messages] == ["ok"] * 20
    assert {t for t in threading.enumerate() if "AnyIO" in t.name} <= before


def test_streams_run_on_trio(server: Recording) -> None:
    remote = Remote(make(endpoint_url=f"{server.url}/v1", model="m"))

    async def run() -> str:
        messages = [{"role": "user", "content": "Hi"}]
        return total([d async for d in remote.astream(messages, None, {})]).text

    assert trio.run(run) == "You said: Hi"


def test_a_stream_that_nobody_reads_any_more_is_given_up(
    say: Callable[..., ChatHuggingFace], server: Recording
) -> None:
    stream = say(faults.stalled(seconds=30)).stream("Hi")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    server.close()  # waits for its connections


# Options ------------------------------------------------------------------------------------------


def test_options_of_a_call_win_over_all_others_by_whichever_name(
    say: Callable[..., ChatHuggingFace], server: Recording
) -> None:
    llm = HuggingFaceEndpoint(endpoint_url=f"{server.url}/v1", max_new_tokens=1, temperature=0.8)
    chat = ChatHuggingFace(llm=llm, temperature=0)
    chat.invoke("Hi")
    assert (server.last.json["max_tokens"], server.last.json["temperature"]) == (1, 0)
    chat.bind(max_tokens=2).invoke("Hi")
    assert server.last.json["max_tokens"] == 2
    chat.bind(max_tokens=2).invoke("Hi", max_new_tokens=3)
    assert server.last.json["max_tokens"] == 3


def test_an_unknown_argument_names_the_nearest_known_one() -> None:
    with pytest.raises(UnknownOptionError, match="'max_new_tokens'"):
        HuggingFaceEndpoint(endpoint_url=URL, max_new_token=3)
    with pytest.raises(UnknownOptionError, match="'cookies'"):
        HuggingFaceEndpoint(endpoint_url=URL, server_kwargs={"cookie": {}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "needed"),
        ({"endpoint_url": "ftp://x"}, "http"),
        ({"endpoint_url": "http://user:pass@x"}, "password"),
        ({"endpoint_url": "http://x:99999"}, "URL"),
        ({"endpoint_url": "http://x/v1?api_key=pass@"}, "secret"),
        ({"endpoint_url": URL, "repo_id": "a/b"}, "not both"),
        ({"repo_id": URL}, "owner/name"),
        ({"endpoint_url": URL, "provider": "groq"}, "provider"),
        ({"endpoint_url": URL, "task": "translation"}, "task"),
        ({"endpoint_url": URL, "timeout": 0}, "timeout"),
        ({"endpoint_url": URL, "max_retries": -1}, "max_retries"),
        ({"endpoint_url": URL, "headers": {"a": "b\r\nc: d"}}, "one line"),
        ({"endpoint_url": URL, "max_new_tokens": 1, "max_tokens": 2}, "same option"),
        ({"endpoint_url": URL, "max_tokens": 1, "model_kwargs": {"max_tokens": 2}}, "twice"),
        ({"endpoint_url": URL, "inference_server_url": "http://y"}, "differ"),
        ({"endpoint_url": URL, "model_kwargs": [1]}, "model_kwargs"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_when_they_are_given(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        HuggingFaceEndpoint(**given)
    assert "pass@" not in str(caught.value)


def test_a_request_that_cannot_be_written_is_refused_before_it_is_sent(
    say: Callable[..., ChatHuggingFace], server: Recording
) -> None:
    for given in ({"temperature": float("nan")}, {"extra_body": {"x": object()}}):
        with pytest.raises(InvalidRequestError, match="JSON"):
            say().invoke("Hi", **given)
    with pytest.raises(InvalidRequestError, match="JSON"):
        say().invoke("half \ud83d of a character")
    with pytest.raises(InvalidRequestError, match="messages"):
        say().invoke("Hi", extra_body={"messages": []})
    assert server.requests == []


def test_caches_tell_servers_models_and_options_apart(server: Recording) -> None:
    def key(**given: Any) -> str:
        llm = HuggingFaceEndpoint(**{"endpoint_url": server.url, "model": "m"} | given)
        return ChatHuggingFace(llm=llm)._get_llm_string()

    keys = [key(), key(model="n"), key(endpoint_url=URL), key(temperature=0.5), key(top_k=1)]
    assert len(set(keys)) == len(keys)
    assert key(timeout=5) == key()


def test_copies_and_pickles_ask_the_same_server(server: Recording) -> None:
    llm = HuggingFaceEndpoint(endpoint_url=f"{server.url}/v1", model="m", max_tokens=2)
    for model in (llm, ChatHuggingFace(llm=llm), Remote(make(endpoint_url=server.url))):
        for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            if not isinstance(other, Remote):
                other.invoke("Hi")
                assert server.last.json["max_tokens"] == 2
    with pytest.raises(InvalidRequestError, match="pickled"):
        pickle.dumps(HuggingFaceEndpoint(client=Scripted(SAID)))


def test_counting_tokens_says_that_the_server_has_the_tokenizer(
    say: Callable[..., ChatHuggingFace],
) -> None:
    with pytest.raises(InvalidRequestError, match="custom_get_token_ids"):
        say().get_num_tokens("Hi")


# Who sees the token -------------------------------------------------------------------------------


def test_a_token_of_the_environment_stays_with_hugging_face(
    server: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    llm = HuggingFaceEndpoint(endpoint_url=server.url)
    llm.invoke("Hi")
    ChatHuggingFace(llm=llm).invoke("Hi")
    assert not any(request.holds(TOKEN) for request in server.requests)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    llm.invoke("Hi")
    assert server.last.token == TOKEN


@pytest.mark.parametrize(
    ("url", "theirs"),
    [
        ("https://huggingface.co/x", True),
        ("https://router.huggingface.co/v1", True),
        ("https://abc.eu.endpoints.huggingface.cloud", True),
        ("http://router.huggingface.co/v1", False),
        ("https://huggingface.co.evil.org", False),
        ("https://evilhuggingface.co", False),
        ("https://someone.hf.space", False),
        ("https://example.org/huggingface.co", False),
    ],
)
def test_hugging_faces_hosts_are_known_by_their_whole_name(url: str, theirs: bool) -> None:
    assert is_hugging_face(url) is theirs


def test_a_token_that_was_given_goes_where_it_was_given_for(server: Recording) -> None:
    HuggingFaceEndpoint(endpoint_url=server.url, huggingfacehub_api_token=TOKEN).invoke("Hi")
    assert server.last.token == TOKEN
    llm = HuggingFaceEndpoint(endpoint_url=server.url)
    ChatHuggingFace(llm=llm, api_key=TOKEN).invoke("Hi")
    assert server.last.token == TOKEN


def test_another_model_named_by_a_url_does_not_get_the_token(server: Recording) -> None:
    llm = HuggingFaceEndpoint(
        endpoint_url="http://127.0.0.1:9/v1", huggingfacehub_api_token=TOKEN,
        headers={"X-Key": TOKEN}, server_kwargs={"cookies": {"a": TOKEN}},
    )  # fmt: skip
    ChatHuggingFace(llm=llm).invoke("Hi", model=f"{server.url}/v1")
    assert not server.last.holds(TOKEN)


def test_offline_means_the_hub_and_not_this_machine(
    server: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert HuggingFaceEndpoint(endpoint_url=server.url).invoke("Hi") == " Hi"
    with pytest.raises(RemoteConnectionError, match="HF_HUB_OFFLINE"):
        HuggingFaceEndpoint(repo_id="a/b", huggingfacehub_api_token=TOKEN).invoke("Hi")


def test_a_repository_wants_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfcore.connection.saved_token", lambda: None)
    with pytest.raises(RemoteAuthenticationError, match="HF_TOKEN"):
        HuggingFaceEndpoint(repo_id="a/b").invoke("Hi")


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    server: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert HuggingFaceEndpoint(endpoint_url=server.url).invoke("Hi") == " Hi"


# Clients of the user's ----------------------------------------------------------------------------


class Scripted:
    """In place of an InferenceClient: it notes what it is asked."""

    def __init__(self, *events: Any) -> None:
        self.events = events
        self.model = "theirs"
        self.asked: list[dict[str, Any]] = []

    def chat_completion(self, messages: Any, **given: Any) -> Any:
        self.asked.append({"messages": messages, **given})
        return iter(self.events)

    def text_generation(self, prompt: str, **given: Any) -> Any:
        raise ValueError("Model m is not supported for task text-generation. Supported: chat")


SAID = {"choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop"}]}


async def test_a_client_is_asked_by_its_own_signature() -> None:
    client = Scripted(SAID)
    chat = ChatHuggingFace(llm=HuggingFaceEndpoint(client=client), top_k=3, max_tokens=2)
    assert chat.invoke("Hi").content == "Hello"
    assert (await chat.ainvoke("Hi")).content == "Hello"  # on a thread: it has no other way
    assert client.asked[0] == client.asked[1]
    assert client.asked[0]["max_tokens"] == 2
    assert client.asked[0]["extra_body"] == {"top_k": 3}


def test_a_client_that_offers_chats_alone_gets_texts_as_chats() -> None:
    assert HuggingFaceEndpoint(client=Scripted(SAID)).invoke("Hi") == "Hello"


def test_a_delta_is_as_a_model_here_gives_it(server: Recording) -> None:
    server.script.append(Answer(calls=[("add", "{}")]))
    remote = Remote(make(endpoint_url=f"{server.url}/v1", model="m"))
    tool = {"type": "function", "function": {"name": "add"}}
    deltas = list(remote.stream([{"role": "user", "content": "add"}], [tool], {}))
    assert all(isinstance(delta, Delta) for delta in deltas)
    done = total(deltas)
    assert [(c.index, c.name) for c in done.tool_calls] == [(0, "add")]
    assert isinstance(done.tool_calls[0], ToolCall)
    assert [d for d in deltas if d.finish_reason] == [deltas[-1]]
    assert [d for d in deltas if d.usage] == [deltas[-1]]


def test_text_generation_takes_one_form_of_an_answer() -> None:
    asked = {"regex": "[ab]", "response_format": {"type": "json_object"}}
    with pytest.raises(InvalidRequestError, match="give one"):
        generation_parameters(asked)
    assert generation_parameters({"regex": "[ab]"})["grammar"]["type"] == "regex"
