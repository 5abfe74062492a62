"""Every field of HuggingFaceEndpoint, and of ChatHuggingFace over it: what it is on the wire.

The rows are data; the test fails when a field has none. A row says what a field adds to the JSON of
a request in each form, or in which words it is refused: nothing is dropped without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, constants
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference import _providers
from huggingface_hub.inference._providers._common import HARDCODED_MODEL_INFERENCE_MAPPING
from huggingface_hub.utils._http import close_session
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.llms import LLM, BaseLLM
from servers.loopback import Request
from servers.recording import Recording

from hfcore import ChatHuggingFace, HuggingFaceEndpoint
from hfcore.errors import InvalidRequestError, UnknownOptionError

TOKEN = "hf_a_secret_of_these_tests"  # noqa: S105  # no secret
MODEL = "owner/name"
Wire = Mapping[str, Any]

TGI: Wire = {"inputs": "Hi", "stream": False, "parameters": {"details": True}}
COMPLETION: Wire = {"model": MODEL, "prompt": "Hi", "stream": False}
CHAT: Wire = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": False}
"""What is sent when nothing is asked for."""

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": SCHEMA},
}
OTHER = {
    "type": "function",
    "function": {"name": "sub", "description": "Subtract.", "parameters": SCHEMA},
}
FORMS = {"tgi": "/", "completion": "/v1", "chat": "/v1"}
WAYS = ("constructor", "bind", "call")
UNKNOWN = "unknown option"
NOT_MEANT: Wire = {"not meant": True}
"""In place of what is added, where a row's value is for another form."""
ELSEWHERE: Wire = {"elsewhere": True}
"""In place of what is added in TGI's form: it has no place there, and completions are asked for."""


@dataclass(frozen=True)
class Row:
    """What a value of a field becomes: added JSON, or words of the error.

    `later`: words of the error when it comes with `bind` or a call; None: it acts there too, in
    the same way. `headers`: what is sent beside the JSON.
    """

    value: Any
    tgi: Wire | str = field(default_factory=dict)
    completion: Wire | str = field(default_factory=dict)
    chat: Wire | str = field(default_factory=dict)
    later: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def same(name: str, value: Any, tgi: Wire | str | None = None, **wire: Any) -> Row:
    """A row of an option with the same place in OpenAI's two forms; TGI's too if not given."""
    everywhere = wire or {name: value}
    return Row(value, everywhere if tgi is None else tgi, everywhere, everywhere)


def of_server(value: Any, **headers: str) -> Row:
    """A row of what belongs to the server, not to a request."""
    return Row(value, later=UNKNOWN, headers=headers)


ENDPOINT: dict[str, list[Row]] = {
    # Where it is and who asks: nothing of it is in the JSON but the model's name.
    "endpoint_url": [],  # in every row below; not an option of calls
    "inference_server_url": [],
    "repo_id": [],
    "provider": [],
    "client": [],
    "async_client": [],
    "task": [],
    "model": [Row(MODEL, later=UNKNOWN)],  # of a chat's call it is an option
    "huggingfacehub_api_token": [of_server(TOKEN, authorization=f"Bearer {TOKEN}")],
    "headers": [of_server({"X-Own": "mine"}, **{"x-own": "mine"})],
    "bill_to": [of_server("team", **{"x-hf-bill-to": "team"})],
    "server_kwargs": [of_server({"cookies": {"a": "b"}}, cookie="a=b")],
    "max_retries": [Row(0)],
    "batch_size": [of_server(3)],
    "streaming": [],
    "timeout": [Row(9.0)],
    # What is asked.
    "max_new_tokens": [
        Row(7, {"max_new_tokens": 7}, {"max_tokens": 7}, {"max_tokens": 7}),
    ],
    "temperature": [
        same("temperature", 0.5),
        same("temperature", 0, tgi={"do_sample": False}),
    ],
    "do_sample": [
        same("do_sample", False, tgi={"do_sample": False}, temperature=0),
        same("do_sample", True, tgi={"do_sample": True}, temperature=1.0),
    ],
    "top_k": [same("top_k", 5)],
    "top_p": [same("top_p", 0.9)],
    "typical_p": [same("typical_p", 0.9)],
    "min_p": [same("min_p", 0.1, tgi=ELSEWHERE)],
    "repetition_penalty": [same("repetition_penalty", 1.1)],
    "frequency_penalty": [same("frequency_penalty", 0.5)],
    "presence_penalty": [same("presence_penalty", 0.5, tgi=ELSEWHERE)],
    "logit_bias": [same("logit_bias", {5: -1.0}, tgi=ELSEWHERE, logit_bias={"5": -1.0})],
    "seed": [same("seed", 0)],
    "stop_sequences": [same("stop_sequences", ["END"], stop=["END"])],
    "n": [same("n", 2, tgi=ELSEWHERE)],
    "logprobs": [Row(True, {}, {"logprobs": 0}, {"logprobs": True})],
    "top_logprobs": [
        Row(2, {"top_n_tokens": 2}, {"logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
    ],
    "min_tokens": [same("min_tokens", 2, tgi=ELSEWHERE)],
    "ignore_eos": [same("ignore_eos", True, tgi=ELSEWHERE)],
    "stop_token_ids": [same("stop_token_ids", [3], tgi=ELSEWHERE)],
    "skip_special_tokens": [same("skip_special_tokens", False, tgi=ELSEWHERE)],
    "add_special_tokens": [
        Row(False, ELSEWHERE, {"add_special_tokens": False}, "add_special_tokens"),
    ],
    "stream_usage": [],
    "response_format": [
        same("response_format", FORMAT, tgi={"grammar": {"type": "json", "value": SCHEMA}}),
    ],
    "regex": [
        same("regex", "a+", tgi={"grammar": {"type": "regex", "value": "a+"}},
             structured_outputs={"regex": "a+"}),
    ],
    "choice": [same("choice", ["a"], tgi=ELSEWHERE, structured_outputs={"choice": ["a"]})],
    "grammar": [
        same("grammar", "start: A", tgi=ELSEWHERE, structured_outputs={"grammar": "start: A"}),
    ],
    "adapter": [Row("legal", {"adapter_id": "legal"}, "adapter", "adapter")],
    "truncate": [Row(9, {"truncate": 9}, "truncate", "truncate")],
    "watermark": [Row(True, {"watermark": True}, "watermark", "watermark")],
    "return_full_text": [Row(True, {}, {}, "return_full_text")],
    "model_kwargs": [  # what is no option of ours goes into the JSON as it is
        Row({"include_stop_str_in_output": True, "top_k": 5}, NOT_MEANT,
            {"include_stop_str_in_output": True, "top_k": 5},
            {"include_stop_str_in_output": True, "top_k": 5}, UNKNOWN),
        Row({"decoder_input_details": True, "top_k": 5},
            {"decoder_input_details": True, "top_k": 5}, NOT_MEANT, NOT_MEANT, UNKNOWN),
    ],
}  # fmt: skip

CHAT_ROWS: dict[str, list[Row]] = {
    "llm": [],
    "model_id": [],
    "max_tokens": [Row(7, chat={"max_tokens": 7})],
    **{
        name: ENDPOINT[name]
        for name in (
            "temperature", "do_sample", "top_k", "top_p", "typical_p", "min_p",
            "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "seed",
            "n", "logprobs", "top_logprobs", "min_tokens", "ignore_eos", "stop_token_ids",
            "skip_special_tokens", "response_format", "regex", "choice", "grammar",
        )
    },
    "stop": [Row(["END"], chat={"stop": ["END"]})],
    "template_variables": [
        Row({"style": "x"}, chat={"chat_template_kwargs": {"style": "x"}}),
    ],
    "reasoning": [
        Row(True, chat={"chat_template_kwargs": {"enable_thinking": True}}),
        Row(False, chat={"chat_template_kwargs": {"enable_thinking": False}}),
    ],
    "parallel_tool_calls": [],
    "parse_special_in_content": [Row(True, chat="parse_special_in_content")],
    "tool_style": [Row("hermes", chat="tool_style")],
    "adapter": [Row("legal", chat="adapter")],
    "priority": [Row(5, chat="priority")],
    "timeout": [Row(9.0)],
    "streaming": [],
    "stream_usage": [],
    "max_retries": [Row(0)],
    "api_key": [of_server(TOKEN, authorization=f"Bearer {TOKEN}")],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_token_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGINGFACEHUB_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Recording]:
    with Recording(extensions=True) as server:
        yield server


def own_fields(kind: type[Any], base: type[Any]) -> set[str]:
    """Fields that are not LangChain's own."""
    return set(kind.model_fields) - set(base.model_fields)


def of_fields(kind: type[Any], *names: str) -> Callable[[Any], Any]:
    """Notes that a test is what fields have instead of rows."""
    SPECIAL.setdefault(kind, set()).update(names)
    return lambda test: test


SPECIAL: dict[type[Any], set[str]] = {}


def test_every_field_has_its_rows() -> None:
    for kind, base, rows in (
        (HuggingFaceEndpoint, BaseLLM, ENDPOINT),
        (ChatHuggingFace, BaseChatModel, CHAT_ROWS),
    ):
        assert set(rows) == own_fields(kind, base)
        assert {name for name, of_name in rows.items() if not of_name} == SPECIAL[kind]
    assert set(BaseLLM.model_fields) == set(LLM.model_fields)


def endpoint(server: Recording, form: str, **given: Any) -> HuggingFaceEndpoint:
    return HuggingFaceEndpoint(**{"endpoint_url": server.url + FORMS[form], "model": MODEL} | given)


def asked(make: Callable[..., Any], way: str, name: str, value: Any) -> None:
    """One request, the option given in that way."""
    if way == "constructor":
        make(**{name: value}).invoke("Hi")
    elif way == "bind":
        make().bind(**{name: value}).invoke("Hi")
    else:
        make().invoke("Hi", **{name: value})


def route(form: str, row: Row) -> tuple[str, Wire | str]:
    """The form that a request goes by, and what is added there."""
    wire: Wire | str = getattr(row, form)
    return ("completion", row.completion) if wire is ELSEWHERE else (form, wire)


def expected(form: str, added: Wire) -> dict[str, Any]:
    if form == "tgi":
        return {**TGI, "parameters": {**TGI["parameters"], **added}}
    return {**(CHAT if form == "chat" else COMPLETION), **added}


def check(server: Recording, form: str, way: str, row: Row, ask: Callable[[], None]) -> None:
    form, wire = route(form, row)
    refused = row.later if way != "constructor" and row.later else wire
    if isinstance(refused, str):
        kind = UnknownOptionError if refused == UNKNOWN else InvalidRequestError
        with pytest.raises(kind, match=refused):
            ask()
        assert server.requests == []
        return
    ask()
    [request] = server.requests
    assert request.json == expected(form, refused)
    assert sent_along(request, row.headers) == row.headers


def sent_along(request: Request, wanted: Mapping[str, str]) -> dict[str, str]:
    """Of the headers, those that are wanted, and a token in any case."""
    names = {*wanted, "authorization"}
    return {name: value for name, value in request.headers.items() if name in names}


def table(rows: Mapping[str, list[Row]], *forms: str) -> list[Any]:
    """(form, field, row) for each row and form."""
    return [
        pytest.param(form, name, row, id=f"{form}-{name}={row.value!r:.20}")
        for name, of_name in rows.items()
        for row in of_name
        for form in forms
        if getattr(row, form) is not NOT_MEANT
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("form", "name", "row"), table(ENDPOINT, "tgi", "completion"))
def test_a_field_of_the_endpoint_in_a_text_request(
    server: Recording, form: str, name: str, row: Row, way: str
) -> None:
    def ask() -> None:
        asked(lambda **given: endpoint(server, form, **given), way, name, row.value)

    check(server, form, way, row, ask)


@pytest.mark.parametrize(("form", "name", "row"), table(ENDPOINT, "chat"))
def test_a_field_of_the_endpoint_in_a_chat(
    server: Recording, form: str, name: str, row: Row
) -> None:
    def ask() -> None:
        ChatHuggingFace(llm=endpoint(server, form, **{name: row.value})).invoke("Hi")

    check(server, form, "constructor", row, ask)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("form", "name", "row"), table(CHAT_ROWS, "chat"))
def test_a_field_of_the_chat(server: Recording, form: str, name: str, row: Row, way: str) -> None:
    def make(**given: Any) -> ChatHuggingFace:
        return ChatHuggingFace(llm=endpoint(server, form), **given)

    check(server, form, way, row, lambda: asked(make, way, name, row.value))


# Fields that are no rows: where a request goes, and what has a meaning beside others only -----


@of_fields(HuggingFaceEndpoint, "endpoint_url", "inference_server_url")
@pytest.mark.parametrize("name", ["endpoint_url", "inference_server_url", "base_url"])
def test_an_address_is_where_requests_go_and_no_option_of_theirs(
    server: Recording, name: str
) -> None:
    HuggingFaceEndpoint(**{name: server.url}).invoke("Hi")
    assert (server.last.path, server.last.json) == ("/", TGI)
    for way in ("bind", "call"):
        with pytest.raises(UnknownOptionError):
            asked(lambda: HuggingFaceEndpoint(endpoint_url=server.url), way, name, server.url)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("path", "form", "to"),
    [
        ("", "tgi", "/"),
        ("/generate_stream", "tgi", "/generate_stream"),
        ("/v1", "completion", "/v1/completions"),
        ("/v1/completions", "completion", "/v1/completions"),
        ("/v1/chat/completions", "chat", "/v1/chat/completions"),
    ],
)
def test_an_address_says_what_a_text_becomes(
    server: Recording, path: str, form: str, to: str
) -> None:
    HuggingFaceEndpoint(endpoint_url=server.url + path, model=MODEL).invoke("Hi")
    assert (server.last.path, server.last.json) == (to, expected(form, {}))


def test_a_server_for_chats_alone_gets_a_text_as_a_chat(server: Recording) -> None:
    server.only_chat = True
    model = HuggingFaceEndpoint(endpoint_url=server.url, model=MODEL)
    assert model.invoke("Hi") == "You said: Hi"
    assert server.last.json == expected("chat", {})


@of_fields(HuggingFaceEndpoint, "task")
@pytest.mark.parametrize("path", ["", "/v1"])
def test_a_task_says_what_a_text_becomes(server: Recording, path: str) -> None:
    given = {"endpoint_url": server.url + path, "model": MODEL}
    HuggingFaceEndpoint(**given, task="conversational").invoke("Hi")
    assert server.last.json == expected("chat", {})
    HuggingFaceEndpoint(**given, task="text-generation").invoke("Hi")
    assert server.last.json == expected("completion" if path else "tgi", {})
    with pytest.raises(InvalidRequestError, match="task"):
        HuggingFaceEndpoint(**given, task="translation")
    with pytest.raises(UnknownOptionError):
        HuggingFaceEndpoint(**given).invoke("Hi", task="conversational")


@of_fields(HuggingFaceEndpoint, "repo_id", "provider")
@pytest.mark.parametrize("name", ["repo_id", "model"])
def test_a_repository_is_asked_for_at_the_router(
    server: Recording, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_providers.CONVERSATIONAL_AUTO_ROUTER, "base_url", server.url)
    llm = HuggingFaceEndpoint(**{name: MODEL}, huggingfacehub_api_token=TOKEN)
    ChatHuggingFace(llm=llm).invoke("Hi")
    assert (server.last.path, server.last.json) == ("/v1/chat/completions", expected("chat", {}))
    assert server.last.token == TOKEN


def test_a_provider_is_asked_by_its_name_of_the_model(
    server: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = InferenceProviderMapping(  # type: ignore[no-untyped-call]
        provider="groq", hf_model_id=MODEL, providerId="theirs", status="live",
        task="conversational",
    )  # fmt: skip
    monkeypatch.setitem(HARDCODED_MODEL_INFERENCE_MAPPING, "groq", {MODEL: known})
    monkeypatch.setattr(constants, "INFERENCE_PROXY_TEMPLATE", f"{server.url}/{{provider}}/openai")
    llm = HuggingFaceEndpoint(repo_id=MODEL, provider="groq", huggingfacehub_api_token=TOKEN)
    ChatHuggingFace(llm=llm).invoke("Hi")
    assert server.last.path.startswith("/groq/openai")
    assert server.last.json == {**expected("chat", {}), "model": "theirs"}


def test_an_address_has_no_repository_and_no_provider(server: Recording) -> None:
    for more in ({"repo_id": MODEL}, {"provider": "groq"}):
        with pytest.raises(InvalidRequestError):
            HuggingFaceEndpoint(endpoint_url=server.url, **more)


@of_fields(HuggingFaceEndpoint, "client", "async_client")
async def test_clients_of_the_users_are_used(server: Recording) -> None:
    own: dict[str, Any] = {
        "model": f"{server.url}/v1", "headers": {"X-Own": "mine"}, "token": TOKEN,
    }  # fmt: skip
    with InferenceClient(**own) as client:
        async with AsyncInferenceClient(**own) as async_client:
            llm = HuggingFaceEndpoint(
                client=client, async_client=async_client, model=MODEL, temperature=0.5
            )
            chat = ChatHuggingFace(llm=llm)
            assert chat.invoke("Hi").text == "You said: Hi"
            assert (await chat.ainvoke("Hi")).text == "You said: Hi"
    close_session()  # of huggingface_hub, which all its clients share
    for request in server.asked:
        assert request.headers["x-own"] == "mine"
        assert request.json == expected("chat", {"temperature": 0.5})


@of_fields(ChatHuggingFace, "llm", "model_id")
def test_a_chat_is_over_an_endpoint_and_has_its_model(server: Recording) -> None:
    llm = endpoint(server, "chat")
    assert ChatHuggingFace(llm=llm).model_id == MODEL
    assert ChatHuggingFace(llm=llm, model_id=MODEL).llm is llm
    with pytest.raises(InvalidRequestError, match="differs"):
        ChatHuggingFace(llm=llm, model_id="owner/other")
    with pytest.raises(InvalidRequestError, match="llm must be"):
        ChatHuggingFace(llm=object())


@pytest.mark.parametrize("way", ["bind", "call"])
def test_a_request_may_name_another_model(server: Recording, way: str) -> None:
    asked(lambda: ChatHuggingFace(llm=endpoint(server, "chat")), way, "model", "owner/other")
    assert server.last.json == {**CHAT, "model": "owner/other"}


@of_fields(ChatHuggingFace, "parallel_tool_calls")
@pytest.mark.parametrize("way", WAYS)
def test_parallel_tool_calls_go_with_tools(server: Recording, way: str) -> None:
    given: dict[str, Any] = {"parallel_tool_calls": False}
    chat = ChatHuggingFace(
        llm=endpoint(server, "chat"), **(given if way == "constructor" else {})
    )  # fmt: skip
    model = chat.bind_tools([TOOL], **(given if way == "bind" else {}))
    model.invoke("Hi", **(given if way == "call" else {}))
    assert server.last.json == expected("chat", {"tools": [TOOL], **given})


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("form", FORMS)
async def test_a_stream_is_asked_for_as_one_with_its_usage(server: Recording, form: str) -> None:
    model: Any = endpoint(server, form)
    model = ChatHuggingFace(llm=model) if form == "chat" else model
    list(model.stream("Hi"))
    assert [chunk async for chunk in model.astream("Hi")]
    wire = {"stream": True} if form == "tgi" else STREAMED
    assert server.bodies == [{**expected(form, {}), **wire}] * 2


@of_fields(HuggingFaceEndpoint, "streaming")
@of_fields(ChatHuggingFace, "streaming")
@pytest.mark.parametrize("form", FORMS)
def test_streaming_makes_an_invocation_a_stream(server: Recording, form: str) -> None:
    model: Any = endpoint(server, form, **({} if form == "chat" else {"streaming": True}))
    model = ChatHuggingFace(llm=model, streaming=True) if form == "chat" else model
    model.invoke("Hi")
    wire = {"stream": True} if form == "tgi" else STREAMED
    assert server.last.json == {**expected(form, {}), **wire}


@of_fields(HuggingFaceEndpoint, "stream_usage")
@of_fields(ChatHuggingFace, "stream_usage")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_usage_may_be_left_out_of_a_stream(server: Recording, form: str, way: str) -> None:
    given = {"stream_usage": False}
    model: Any = endpoint(
        server, form, **(given if way == "constructor" and form != "chat" else {})
    )
    if form == "chat":
        model = ChatHuggingFace(llm=model, **(given if way == "constructor" else {}))
    model = model.bind(**given) if way == "bind" else model
    list(model.stream("Hi", **(given if way == "call" else {})))
    assert server.last.json == {**expected(form, {}), "stream": True}


@pytest.mark.parametrize(
    ("choice", "wire"),
    [
        ("any", "required"), (True, "required"), ("required", "required"), ("auto", "auto"),
        ("none", "none"), (False, "none"),
        ("add", {"type": "function", "function": {"name": "add"}}),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
    ],
)  # fmt: skip
def test_a_choice_among_tools_is_in_openais_form(server: Recording, choice: Any, wire: Any) -> None:
    ChatHuggingFace(llm=endpoint(server, "chat")).bind_tools(
        [TOOL, OTHER], tool_choice=choice
    ).invoke("Hi")
    assert server.last.json == expected("chat", {"tools": [TOOL, OTHER], "tool_choice": wire})


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_is_asked_for_in_openais_form(server: Recording, method: Any) -> None:
    schema = {"title": "thing", **SCHEMA}
    chat = ChatHuggingFace(llm=endpoint(server, "chat"))
    chat.with_structured_output(schema, method=method, include_raw=True).invoke("Hi")
    server.extensions = False
    chat.with_structured_output(schema, method=method, include_raw=True).invoke("Hi")
    body = server.last.json
    if method == "function_calling":
        assert body["tool_choice"] == {"type": "function", "function": {"name": "thing"}}
    else:
        kind = "json_schema" if method == "json_schema" else "json_object"
        assert body["response_format"]["type"] == kind
