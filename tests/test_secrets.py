"""No token anywhere: not in what classes print, write, pickle, log and raise."""

from __future__ import annotations

import copy
import functools
import io
import json
import logging
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core._api import LangChainBetaWarning
from langchain_core.load import dumpd, dumps, load
from servers import faults
from servers.loopback import Exchange
from servers.recording import Recording

import hfcore
from hfcore import (
    ChatHuggingFace,
    HuggingFaceEmbeddings,
    HuggingFaceEndpoint,
    HuggingFaceEndpointEmbeddings,
    HuggingFacePipeline,
)
from hfcore.connection import Connection, make
from hfcore.engine import shared_engine
from hfcore.errors import HfcoreError, RemoteAuthenticationError
from hfcore.remote import Remote
from hfcore.testing import tiny_encoder

TOKEN = "hf_SECRETsecretSECRETsecret"  # noqa: S105  # nobody's
HEADER = "headerSECRETheader"
COOKIE = "cookieSECRETcookie"
SECRETS = (TOKEN, HEADER, COOKIE)
URL = "http://127.0.0.1:9/v1"
REMOTE: dict[str, Any] = {
    "endpoint_url": URL, "huggingfacehub_api_token": TOKEN,
    "headers": {"X-Api-Key": HEADER, "X-Team": "a"},
    "server_kwargs": {"cookies": {"session": COOKIE}},
}  # fmt: skip
OF_EMBEDDINGS = {name: value for name, value in REMOTE.items() if name != "server_kwargs"}
PLACED = {"huggingfacehub_api_token": TOKEN, "backend": "auto", "fallback": "remote"}


@functools.cache
def encoder() -> str:
    return str(tiny_encoder(tempfile.mkdtemp()))


MAKERS: dict[str, Callable[[], Any]] = {
    "endpoint": lambda: HuggingFaceEndpoint(**REMOTE),
    "endpoint, token among server_kwargs": lambda: HuggingFaceEndpoint(
        endpoint_url=URL, server_kwargs={"api_key": TOKEN, "headers": {"Authorization": HEADER}}
    ),
    "endpoint, bound": lambda: HuggingFaceEndpoint(**REMOTE).bind(stop=["x"]),
    "chat over endpoint": lambda: ChatHuggingFace(llm=HuggingFaceEndpoint(**REMOTE)),
    "chat over endpoint, api_key": lambda: ChatHuggingFace(
        llm=HuggingFaceEndpoint(endpoint_url=URL), api_key=TOKEN
    ),
    "remote chat": lambda: ChatHuggingFace.from_model_id(
        "owner/name", backend="remote", huggingfacehub_api_token=TOKEN
    ),
    "chat with tools": lambda: ChatHuggingFace(llm=HuggingFaceEndpoint(**REMOTE)).bind_tools([]),
    "local chat": lambda: ChatHuggingFace(model="owner/name", token=TOKEN, api_key=TOKEN),
    "placed chat": lambda: ChatHuggingFace(model="owner/name", **PLACED),
    "pipeline": lambda: HuggingFacePipeline(model_id="owner/name", token=TOKEN),
    "pipeline, model_kwargs": lambda: HuggingFacePipeline(
        model_id="owner/name", model_kwargs={"use_auth_token": TOKEN}
    ),
    "placed pipeline": lambda: HuggingFacePipeline(model_id="owner/name", **PLACED),
    "pipeline with a server": lambda: HuggingFacePipeline(
        model_id="owner/name", fallback=HuggingFaceEndpoint(**REMOTE)
    ),
    "endpoint embeddings": lambda: HuggingFaceEndpointEmbeddings(**OF_EMBEDDINGS),
    "embeddings": lambda: HuggingFaceEmbeddings(
        model_name=encoder(), model_kwargs={"token": TOKEN}
    ),
    "connection": lambda: make(
        endpoint_url=URL, token=TOKEN, headers={"Cookie": COOKIE, "X-Key": HEADER}
    ),
    "backend": lambda: Remote(make(repo_id="owner/name", token=TOKEN)),
    "shared engine": lambda: shared_engine("owner/name", token=TOKEN),
}


def shown(value: Any) -> dict[str, str]:
    """Everything that a value can be written as."""
    found = {
        "repr": repr(value), "str": str(value), "f-string": f"{value}",
        "pickle": written(lambda: pickled(value)),
        "deep copy": written(lambda: repr(copy.deepcopy(value))),
    }  # fmt: skip
    if hasattr(value, "model_dump"):
        found["dump"] = str(value.model_dump())
        found["json"] = written(value.model_dump_json)
    if hasattr(value, "lc_id"):
        found |= {"dumps": dumps(value), "dumpd": json.dumps(dumpd(value), default=repr)}
    for name in ("_identifying_params", "lc_attributes", "lc_secrets"):
        found[name] = repr(getattr(value, name, None))
    if hasattr(value, "asdict"):
        found["dict"] = repr(value.asdict())
    if hasattr(value, "_get_ls_params"):
        found["tracing"] = repr(value._get_ls_params())
    return found


def pickled(value: Any) -> str:
    """The pickle, and that of its pickle: what was left out is not made up for."""
    once = pickle.dumps(value)
    return (once + pickle.dumps(pickle.loads(once))).decode("latin-1")


def written(dump: Callable[[], str]) -> str:
    """A form, where a value has it; else the words of the error that says that it has none."""
    try:
        return dump()
    except Exception as error:
        return str(error)


@pytest.fixture(autouse=True)
def _no_token_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGINGFACEHUB_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", list(MAKERS))
def test_no_form_of_a_value_holds_a_secret(name: str) -> None:
    for form, text in shown(MAKERS[name]()).items():
        for secret in SECRETS:
            assert secret not in text, f"{form} of {name}"


def test_every_public_class_that_takes_a_token_is_here() -> None:
    made = {type(make()) for make in MAKERS.values()}
    for name in hfcore.__all__:
        kind = getattr(hfcore, name)
        if hasattr(kind, "model_fields"):
            assert kind in made, name


def test_a_model_of_a_written_form_finds_the_token_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HUGGINGFACEHUB_API_TOKEN", TOKEN)
    written = dumpd(HuggingFaceEndpoint(**REMOTE, temperature=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LangChainBetaWarning)
        again = load(
            written, valid_namespaces=["hfcore"], allowed_objects="all", secrets_from_env=True
        )
    assert isinstance(again, HuggingFaceEndpoint)
    assert again.huggingfacehub_api_token is not None
    assert again.huggingfacehub_api_token.get_secret_value() == TOKEN
    assert (again.temperature, again.headers) == (0.5, {"X-Team": "a"})


# What is raised and logged ------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[Callable[[], str]]:
    """Everything that anybody logs, at every level."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream.getvalue
    root.removeHandler(handler)
    root.setLevel(before)


def echo(exchange: Exchange) -> None:
    """A server that says back what it was sent."""
    words = f"Incorrect API key provided: {dict(exchange.request.headers)}"
    exchange.reply_json(401, {"error": {"message": words}})


FAILING = {
    "echoed": echo,
    "401": faults.unauthorised(),
    "gated": faults.gated(),
    "404": faults.missing(),
    "429": faults.too_many("100"),
    "500": faults.broken(500),
    "page": faults.page(),
    "redirect": faults.redirect("http://127.0.0.1:9/elsewhere"),
    "reset": faults.reset(),
    "cut": faults.closed_mid_stream(),
    "malformed": faults.malformed(),
    "error event": faults.error_event(f"bad key {TOKEN}"),
}


@pytest.mark.parametrize("fault", list(FAILING))
async def test_no_error_and_no_log_line_holds_a_secret(fault: str, log: Callable[[], str]) -> None:
    with Recording(*[FAILING[fault]] * 8) as server:
        given = {**REMOTE, "endpoint_url": f"{server.url}/v1", "max_retries": 0}
        llm = HuggingFaceEndpoint(**given)
        chat = ChatHuggingFace(llm=llm)
        for ask in (lambda: chat.invoke("Hi"), lambda: llm.invoke("Hi")):
            with pytest.raises(HfcoreError) as caught:
                ask()
            check(caught.value)
        with pytest.raises(HfcoreError) as caught:
            await chat.ainvoke("Hi")
        check(caught.value)
        with pytest.raises(HfcoreError) as caught:
            HuggingFaceEndpointEmbeddings(
                **OF_EMBEDDINGS | {"endpoint_url": f"{server.url}/v1", "max_retries": 0}
            ).embed_query("Hi")
        check(caught.value)
    assert not any(secret in log() for secret in SECRETS)


def check(error: BaseException) -> None:
    forms = [str(error), repr(error), repr(vars(error)), pickle.dumps(error).decode("latin-1")]
    forms += traceback.format_exception(error)
    assert not any(secret in form for secret in SECRETS for form in forms)


def test_a_refused_argument_does_not_show_the_others() -> None:
    for wrong in ({"temprature": 1}, {"max_new_tokens": "many"}, {"timeout": -1}, {"headers": 3}):
        with pytest.raises(HfcoreError) as caught:
            HuggingFaceEndpoint(**REMOTE | wrong)
        check(caught.value)


def test_a_token_that_is_no_text_is_not_shown() -> None:
    with pytest.raises(HfcoreError) as caught:
        HuggingFaceEndpoint(endpoint_url=URL, huggingfacehub_api_token=[TOKEN])
    check(caught.value)


def test_an_url_with_a_password_is_refused_without_it() -> None:
    with pytest.raises(HfcoreError) as caught:
        HuggingFaceEndpoint(endpoint_url=f"http://me:{TOKEN}@127.0.0.1:9/v1?key={HEADER}")
    check(caught.value)


def test_a_missing_token_is_said_without_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfcore.connection.saved_token", lambda: None)
    with pytest.raises(RemoteAuthenticationError) as caught:
        Connection(model="owner/name", headers={"X-Key": HEADER}).check_reach()
    check(caught.value)
