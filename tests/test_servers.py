"""The servers of the tests do what other tests trust them to: refuse, record, break, end."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected
from typing import Any
from urllib.error import HTTPError

import pytest
from servers import faults
from servers.loopback import Exchange, Gone, Loopback
from servers.recording import Answer, Recording, example, split, vector
from servers.schema import refusal

USER = {"role": "user", "content": "Hello, 3 times"}
CHAT = {"model": "m", "messages": [USER]}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def post(server: Loopback, path: str, body: Any, **headers: str) -> Any:
    """The JSON of an answer, or the text of a stream."""
    request = urllib.request.Request(  # noqa: S310  # loopback
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        text = answer.read().decode()
        return text if "event-stream" in answer.headers["Content-Type"] else json.loads(text)


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"top_k": 5}, "Unrecognized request argument supplied: top_k"),
        ({"temperature": 3}, "temperature: must be at most 2"),
        ({"temperature": True}, "temperature: expected a number"),
        ({"stop": []}, "stop: must have 1 to 4 items"),
        ({"n": 0}, "n: must be at least 1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x: expected a string"),
        ({"stream_options": {"include_usage": True}}, "only allowed when 'stream'"),
        ({"top_logprobs": 2}, "only allowed when 'logprobs' is true"),
        ({"tool_choice": "auto"}, "only allowed when 'tools' are specified"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
         "sub is none of the tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "function.name"),
        ({"response_format": {"type": "json_object", "value": {}}}, "in response_format: value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        ({"messages": []}, "at least"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
        ({"messages": [USER | {"content": [{"type": "image", "base64": "x"}]}]}, "image_url"),
        ({"messages": [{"role": "assistant", "content": "", "reasoning": "x"}]}, "reasoning"),
        ({"messages": [USER, {"role": "tool", "content": "", "tool_call_id": "2"}]}, "has the id"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "exclude"),
    ],
)  # fmt: skip
def test_what_openai_would_refuse_is_refused_with_words(more: dict[str, Any], words: str) -> None:
    said = refusal("chat", CHAT | more)
    assert said is not None
    assert words in said or words == "at least"


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0, "top_p": 1, "seed": -1, "n": 2, "stop": ["a"], "user": "u"},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"logprobs": True, "top_logprobs": 20, "logit_bias": {"5": -100}},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]},
                      {"role": "tool", "content": "x", "tool_call_id": "1"}]},
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]},
    ],
)  # fmt: skip
def test_what_openai_takes_is_taken(more: dict[str, Any]) -> None:
    assert refusal("chat", CHAT | more) is None


def test_extensions_are_taken_by_the_switch_alone() -> None:
    more = CHAT | {"top_k": 5, "repetition_penalty": 1.1, "min_p": 0.1}
    assert refusal("chat", more, extensions=True) is None
    assert refusal("chat", CHAT | {"topk": 5}, extensions=True) is not None


def test_requests_are_recorded_and_answered() -> None:
    with Recording() as server:
        said = post(server, "/v1/chat/completions", CHAT, Authorization="Bearer hf_x")
    assert said["choices"][0]["message"]["content"] == "You said: Hello, 3 times"
    assert server.bodies == [CHAT]
    assert server.last.token == "hf_x"  # noqa: S105  # no secret
    assert server.last.holds("hf_x")
    assert not server.last.holds("hf_y")


def test_a_refusal_carries_its_words_and_a_request_id() -> None:
    with Recording() as server, pytest.raises(HTTPError) as caught:
        post(server, "/v1/chat/completions", CHAT | {"top_k": 1})
    with caught.value as error:
        assert error.code == 422
        assert error.headers["X-Request-Id"] == "rec-1"
        assert "top_k" in json.loads(error.read())["error"]["message"]


def test_a_stream_says_what_the_whole_answer_says() -> None:
    script = [Answer("Hi there", "hm hm", [("add", '{"a": 1}')])] * 2
    asked = CHAT | {"tools": [TOOL], "logprobs": True}
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    with Recording(*script) as server:
        whole = post(server, "/v1/chat/completions", asked)
        parts = events(post(server, "/v1/chat/completions", asked | streaming))
    message = whole["choices"][0]["message"]
    deltas = [part["choices"][0]["delta"] for part in parts if part["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(d.get("content", "") for d in deltas) == message["content"] == "Hi there"
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm hm"
    assert "".join(c["function"]["arguments"] for c in calls) == '{"a": 1}'
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert parts[-1]["usage"] == whole["usage"]
    assert parts[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_several_answers_interleave() -> None:
    with Recording() as server:
        parts = events(post(server, "/chat/completions", CHAT | {"n": 2, "stream": True}))
    assert [part["choices"][0]["index"] for part in parts[:4]] == [0, 1, 0, 1]


def test_texts_are_generated_in_the_forms_of_tgi_and_openai() -> None:
    with Recording() as server:
        [root] = post(server, "/", {"inputs": "a b", "parameters": {"max_new_tokens": 1}})
        whole = post(server, "/generate", {"inputs": "a b", "parameters": {"details": True}})
        stream = post(server, "/generate_stream", {"inputs": "a b"})
        old = post(server, "/v1/completions", {"prompt": "a b", "model": "m", "stop": " b"})
    assert root == {"generated_text": " a"}
    assert whole["details"]["finish_reason"] == "eos_token"
    last = json.loads(stream.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["generated_text"] == whole["generated_text"] == " a b"
    assert old["choices"][0]["text"] == " a"


def test_embeddings_are_the_same_in_both_forms() -> None:
    with Recording(max_batch=2) as server:
        theirs = post(server, "/v1/embeddings", {"input": ["a", "b"], "model": "m"})
        tei = post(server, "/embed", {"inputs": ["a", "b"]})
        with pytest.raises(HTTPError) as caught:
            post(server, "/embed", {"inputs": ["a", "b", "c"]})
        caught.value.close()
    assert [row["embedding"] for row in theirs["data"]] == tei == [vector("a"), vector("b")]


def test_examples_follow_their_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/n"}, "kind": {"enum": ["x"]},
                       "list": {"type": "array"}},
        "$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "integer", "maximum": 2}]}},
    }  # fmt: skip
    assert example(schema, "take 3") == {"n": 2, "kind": "x", "list": ["take 3"]}


def test_splitting_keeps_every_character() -> None:
    assert "".join(split(faults.TEXT + "\n\n x  y")) == faults.TEXT + "\n\n x  y"


def test_errors_of_the_script_come_in_its_order() -> None:
    with Recording(faults.too_many("7"), faults.unavailable()) as server:
        codes = []
        for _ in range(2):
            with pytest.raises(HTTPError) as caught:
                post(server, "/v1/chat/completions", CHAT)
            codes.append((caught.value.code, caught.value.headers["Retry-After"]))
            caught.value.close()
        post(server, "/v1/chat/completions", CHAT)
    assert codes == [(429, "7"), (503, None)]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (faults.reset(), ConnectionResetError),
        (faults.closed(), RemoteDisconnected),
        (faults.cut_body(), IncompleteRead),
        (faults.reset_mid_stream(), ConnectionResetError),
        (faults.closed_mid_stream(), IncompleteRead),
        (faults.silent(), TimeoutError),
        (faults.stalled(), TimeoutError),
    ],
)
def test_connections_break_as_they_should(fault: Any, kind: type[Exception]) -> None:
    with Recording(fault) as server:
        connection = HTTPConnection(server.host, server.port, timeout=0.5)

        def ask() -> None:
            connection.request("POST", "/v1/chat/completions", json.dumps(CHAT))
            connection.getresponse().read()

        with pytest.raises(kind):
            ask()
        connection.close()


@pytest.mark.parametrize("fault", [faults.bytewise(), faults.bytewise(size=7)])
def test_a_stream_in_odd_chunks_is_sound(fault: Any) -> None:
    with Recording(fault) as server:
        parts = events(post(server, "/v1/chat/completions", CHAT))
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == faults.TEXT


def test_a_long_line_is_one_line() -> None:
    with Recording(faults.long_line(1_000_000)) as server:
        text = post(server, "/v1/chat/completions", CHAT)
    assert max(map(len, text.split("\n"))) > 1_000_000


def test_nothing_is_left_of_a_server_that_was_stalling() -> None:
    before = set(threading.enumerate())
    server = Recording(*[faults.stalled()] * 3)
    server.start()
    connections = [HTTPConnection(server.host, server.port, timeout=5) for _ in range(3)]
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT))
    answers = [connection.getresponse() for connection in connections]
    begun = time.monotonic()
    server.close()
    assert time.monotonic() - begun < 5
    assert set(threading.enumerate()) == before
    for connection, answer in zip(connections, answers, strict=True):
        answer.close()
        connection.close()


def test_a_client_that_leaves_is_counted() -> None:
    with Recording(faults.stalled()) as server:
        connection = HTTPConnection(server.host, server.port, timeout=5)
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT))
        answer = connection.getresponse()
        answer.read(10)
        answer.close()
        connection.close()
        ends = time.monotonic() + 5
        while not server.gone and time.monotonic() < ends:
            time.sleep(0.01)
        assert server.gone == 1


def test_a_defect_of_the_server_is_the_tests_failure() -> None:
    def wrong(exchange: Exchange) -> None:
        raise LookupError(exchange.request.path)

    server = Recording(wrong)
    server.start()
    connection = HTTPConnection(server.host, server.port, timeout=5)
    connection.request("POST", "/here", "{}")
    with pytest.raises(RemoteDisconnected):
        connection.getresponse()
    connection.close()
    with pytest.raises(LookupError, match="/here"):
        server.close()
    assert issubclass(Gone, Exception)
