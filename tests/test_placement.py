"""Where a model runs: every backend in every situation, and no prompt on the wire that may not be.

The server of each test sees every request that is made, so an empty list is the proof.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.inference import _providers
from langchain_core.messages import AIMessage, HumanMessage
from servers.recording import Recording

from hfcore import ChatHuggingFace, HuggingFaceEndpoint, HuggingFacePipeline, hub
from hfcore.engine import Engine
from hfcore.errors import (
    HfcoreError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelTooLargeError,
    PlacementError,
    RemoteAuthenticationError,
    RemoteConnectionError,
    UnsupportedModelError,
)

TOKEN = "hf_a_secret_of_these_tests"  # noqa: S105  # nobody's
REPO = "owner/name"
SECRET = "a prompt that may not leave"  # noqa: S105  # but for where it is sent
"""What is asked: it must not be in any request in the local modes."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    """Hugging Face, as far as these tests are concerned: the hub and its router."""
    with Recording() as server:
        monkeypatch.setattr(_providers.CONVERSATIONAL_AUTO_ROUTER, "base_url", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for name in ("HF_TOKEN", "HUGGINGFACEHUB_API_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("hfcore.connection.saved_token", lambda: None)
        yield server


class Situation:
    """How things stand with the model here, and with the way to the server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Recording, folder: Path) -> None:
        self._patch = monkeypatch
        self.server = server
        self.folder = folder
        self.model: str | None = None
        self.given: dict[str, Any] = {"huggingfacehub_api_token": TOKEN}

    def here(self, tiny: Path) -> None:
        """The files of the repository are in the cache."""
        self._resolve(lambda: tiny)

    def no_file(self) -> None:
        """Neither in the cache, nor at the hub."""

        def missing() -> Path:
            raise ModelNotFoundError(f"{REPO}: no such model on the hub", path=REPO)

        self._resolve(missing)

    def unknown_family(self, tiny: Path) -> None:
        """The files are here, and the engine does not know what they are."""
        strange = self.folder / "strange.gguf"
        strange.write_bytes(tiny.read_bytes().replace(b"llama", b"mysty"))
        self._resolve(lambda: strange)

    def too_large(self, tiny: Path) -> None:
        """The files are here, and do not fit."""
        self._resolve(lambda: tiny)

        def full(*_: Any, **__: Any) -> None:
            raise ModelTooLargeError("weights do not fit", needed=2, available=1)

        self._patch.setattr(Engine, "__init__", full)

    def too_large_to_fetch(self) -> None:
        """The hub has them, and says that they are larger than memory."""
        self.no_file()
        self._patch.setattr(hub, "bytes_to_fetch", lambda *_, **__: 1 << 60)
        self._patch.setattr(hub, "fetch_config", lambda *_, **__: None)

    def unknown_family_to_fetch(self) -> None:
        """The hub has them, and its config.json says what they are."""
        config = self.folder / "config.json"
        config.write_text('{"model_type": "mystery", "architectures": ["MysteryForCausalLM"]}')
        self._patch.setattr(hub, "bytes_to_fetch", lambda *_, **__: 10)
        self._patch.setattr(hub, "fetch_config", lambda *_, **__: config)

    def no_token(self) -> None:
        self.given = {}

    def offline(self) -> None:
        self._patch.setattr(constants, "HF_HUB_OFFLINE", True)

    def _resolve(self, find: Callable[[], Path]) -> None:
        self._patch.setattr(hub, "resolve", lambda *_, **__: find())


@pytest.fixture
def situation(monkeypatch: pytest.MonkeyPatch, server: Recording, tmp_path: Path) -> Situation:
    return Situation(monkeypatch, server, tmp_path)


MODES: dict[str, dict[str, Any]] = {
    "local": {"backend": "local"},
    "pipeline": {"backend": "pipeline"},
    "auto": {"backend": "auto"},
    "fallback": {"backend": "local", "fallback": "remote"},
    "auto+fallback": {"backend": "auto", "fallback": "remote"},
    "remote": {"backend": "remote"},
    "endpoint": {"backend": "endpoint"},
}
LOCAL = ("local", "pipeline")

# What runs ("local", "remote"), or what is raised, by situation and mode. "both": PlacementError.
TABLE: dict[str, dict[str, Any]] = {
    "here": {"local": "local", "auto": "local", "fallback": "local", "remote": "remote"},
    "no file": {
        "local": ModelNotFoundError, "auto": "remote", "fallback": "remote", "remote": "remote",
    },
    "unknown family": {
        "local": UnsupportedModelError, "auto": "remote", "fallback": "remote", "remote": "remote",
    },
    "too large": {
        "local": ModelTooLargeError, "auto": "remote", "fallback": "remote", "remote": "remote",
    },
    "too large to fetch": {
        "local": ModelNotFoundError, "auto": "remote", "fallback": "remote", "remote": "remote",
    },
    "here, no token": {
        "local": "local", "auto": "local", "fallback": "local",
        "remote": RemoteAuthenticationError,
    },
    "no file, no token": {
        "local": ModelNotFoundError, "auto": PlacementError, "fallback": PlacementError,
        "remote": RemoteAuthenticationError,
    },
    "too large, no token": {
        "local": ModelTooLargeError, "auto": PlacementError, "fallback": PlacementError,
        "remote": RemoteAuthenticationError,
    },
    "here, offline": {
        "local": "local", "auto": "local", "fallback": "local", "remote": RemoteConnectionError,
    },
    "no file, offline": {
        "local": ModelNotFoundError, "auto": PlacementError, "fallback": PlacementError,
        "remote": RemoteConnectionError,
    },
    "unknown family, offline, no token": {
        "local": UnsupportedModelError, "auto": PlacementError, "fallback": PlacementError,
        "remote": HfcoreError,
    },
}  # fmt: skip
SAME_AS = {"pipeline": "local", "auto+fallback": "auto", "endpoint": "remote"}


def arrange(situation: Situation, name: str, tiny: Path) -> None:
    for part in name.split(", "):
        if part in ("here", "too large", "unknown family"):
            getattr(situation, part.replace(" ", "_"))(tiny)
        else:
            getattr(situation, part.replace(" ", "_"))()


def chat_of(situation: Situation, mode: str, **more: Any) -> ChatHuggingFace:
    given = {**situation.given, **MODES[mode], "max_tokens": 2, "temperature": 0, **more}
    return ChatHuggingFace.from_model_id(REPO, **given)


def answers(chat: ChatHuggingFace) -> list[Callable[[], AIMessage]]:
    return [
        lambda: chat.invoke(SECRET),
        lambda: list(chat.stream(SECRET))[-1],
        lambda: chat.batch([SECRET])[0],
    ]


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", list(TABLE))
async def test_every_backend_in_every_situation(
    situation: Situation, tiny: Path, name: str, mode: str
) -> None:
    arrange(situation, name, tiny)
    wanted = TABLE[name][SAME_AS.get(mode, mode)]
    chat = chat_of(situation, mode)
    if not isinstance(wanted, str):
        for ask in answers(chat):
            with pytest.raises(wanted):
                ask()
        with pytest.raises(wanted):
            await chat.ainvoke(SECRET)
        with pytest.raises(wanted):
            _ = [chunk async for chunk in chat.astream(SECRET)]
    else:
        said = [ask() for ask in answers(chat)] + [await chat.ainvoke(SECRET)]
        said.append([chunk async for chunk in chat.astream(SECRET)][-1])
        for message in said:
            assert message.response_metadata.get("backend", "local") == wanted
    seen = [request.holds(SECRET) for request in situation.server.requests]
    if mode in LOCAL:
        assert situation.server.requests == []
    assert any(seen) is (wanted == "remote")


def test_a_row_for_every_mode() -> None:
    for name, row in TABLE.items():
        assert {SAME_AS.get(mode, mode) for mode in MODES} == set(row), name


def test_the_answer_and_the_log_say_what_was_chosen_and_why(
    situation: Situation, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    situation.unknown_family(tiny)
    with caplog.at_level(logging.INFO, logger="hfcore"):
        chat = chat_of(situation, "auto")
        about = chat.invoke("Hi").response_metadata
        chat.invoke("Hi")
    assert about["backend"] == "remote"
    assert "mysty" in about["placement"]
    [line] = [r.getMessage() for r in caplog.records if r.name == "hfcore"]
    assert "mysty" in line
    assert TOKEN not in line


def test_auto_does_not_fetch_what_cannot_run(
    situation: Situation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(model: Any, **how: Any) -> Path:
        if Path(model).exists():
            return Path(model)
        assert how.get("local_files_only"), "it was fetched"
        raise ModelNotFoundError("not in the cache", path=REPO)

    situation.unknown_family_to_fetch()
    monkeypatch.setattr(hub, "resolve", never)
    about = chat_of(situation, "auto").invoke("Hi").response_metadata
    assert "mystery" in about["placement"]
    situation.too_large_to_fetch()
    monkeypatch.setattr(hub, "resolve", never)
    about = chat_of(situation, "auto").invoke("Hi").response_metadata
    assert "of memory are free" in about["placement"]


def test_an_answer_of_here_says_so_where_there_was_a_choice(
    situation: Situation, tiny: Path
) -> None:
    situation.here(tiny)
    about = chat_of(situation, "auto").invoke("Hi").response_metadata
    assert (about["backend"], "here" in about["placement"]) == ("local", True)
    assert "placement" not in chat_of(situation, "local").invoke("Hi").response_metadata


def test_an_error_of_both_places_has_both_reasons(situation: Situation) -> None:
    situation.no_file()
    situation.no_token()
    with pytest.raises(PlacementError, match="no such model") as caught:
        chat_of(situation, "auto").invoke("Hi")
    assert "no such model" in caught.value.local
    assert "HF_TOKEN" in caught.value.remote


def test_a_wrong_request_is_wrong_and_goes_nowhere(situation: Situation, tiny: Path) -> None:
    situation.here(tiny)
    chat = chat_of(situation, "fallback")
    for wrong in ({"temperature": -1}, {"top_p": 7}, {"adapter": "/no/such"}):
        with pytest.raises(HfcoreError):
            chat.invoke(SECRET, **wrong)
    with pytest.raises(HfcoreError):
        chat.invoke(SECRET * 5000)  # more than the context holds
    assert situation.server.requests == []


def test_a_lack_of_memory_before_the_first_token_goes_elsewhere_and_later_does_not(
    situation: Situation, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfcore.backends import Local
    from hfcore.engine import Delta

    situation.here(tiny)
    chat = chat_of(situation, "fallback")

    def fails(begun: bool) -> Callable[..., Iterator[Delta]]:
        def stream(*_: Any) -> Iterator[Delta]:
            if begun:
                yield Delta("Hel")
            raise ModelTooLargeError("no room for the cache", needed=2, available=1)

        return stream

    monkeypatch.setattr(Local, "stream", fails(begun=True))
    with pytest.raises(ModelTooLargeError):
        chat.invoke(SECRET)
    assert not any(request.holds(SECRET) for request in situation.server.requests)
    monkeypatch.setattr(Local, "stream", fails(begun=False))
    assert "no room" in chat.invoke("Hi").response_metadata["placement"]


def test_what_was_decided_is_not_decided_again(
    situation: Situation, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def missing(*_: Any, **how: Any) -> Path:
        if not how.get("local_files_only"):  # that is how caches ask which model it is
            tried.append(1)
        raise ModelNotFoundError("not here", path=REPO)

    monkeypatch.setattr(hub, "resolve", missing)
    chat = chat_of(situation, "fallback")
    for _ in range(3):
        chat.invoke("Hi")
    assert len(tried) == 1


def test_the_fallback_may_be_a_server_of_ones_own(server: Recording, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.gguf")
    own = HuggingFaceEndpoint(endpoint_url=f"{server.url}/v1", model="m")
    llm = HuggingFacePipeline(model_id=missing, fallback=own)
    assert llm.invoke("Hi") == " Hi"
    assert server.last.json["model"] == "m"
    chat = ChatHuggingFace(model=missing, backend="auto", endpoint_url=f"{server.url}/v1")
    assert chat.invoke("Hi").response_metadata["backend"] == "remote"
    assert server.last.json["model"] == "none"


def test_a_token_of_the_hub_does_not_go_to_another_server(
    server: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    chat = ChatHuggingFace(
        model=str(tmp_path / "none.gguf"), backend="auto", endpoint_url=server.url, token=TOKEN
    )
    chat.invoke("Hi")
    assert not any(request.holds(TOKEN) for request in server.requests)


def test_an_image_is_read_where_a_server_runs_the_model_and_refused_here(
    situation: Situation, tiny: Path
) -> None:
    look = [HumanMessage([{"type": "image", "url": "https://example.org/x.png"}])]
    situation.no_file()
    chat_of(situation, "auto").invoke(look)
    assert situation.server.last.json["messages"][0]["content"][0]["type"] == "image_url"
    situation.here(tiny)
    situation.server.requests.clear()
    chat = chat_of(situation, "auto")
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="text only"):
            chat.invoke(look)
    assert situation.server.requests == []


def test_a_path_has_no_namesake_at_hugging_face(situation: Situation, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.gguf")
    with pytest.raises(PlacementError, match="path"):
        ChatHuggingFace.from_model_id(missing, backend="auto", token=TOKEN).invoke(SECRET)
    assert situation.server.requests == []


@pytest.mark.parametrize(
    "given",
    [
        {"endpoint_url": "http://127.0.0.1:9"},
        {"provider": "groq"},
        {"backend": "local", "headers": {"a": "b"}},
        {"backend": "remote", "threads": 2},
        {"backend": "transformers", "fallback": "remote"},
        {"backend": "auto", "fallback": "elsewhere"},
        {"backend": "nowhere"},
    ],
)
def test_arguments_of_the_other_place_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        ChatHuggingFace(model=REPO, **given)


def test_copies_and_pickles_follow_the_same_rule(situation: Situation) -> None:
    situation.no_file()
    chat = chat_of(situation, "fallback")
    chat.invoke("Hi")
    other = pickle.loads(pickle.dumps(chat))
    with pytest.raises(PlacementError):  # the token is not in the pickle
        other.invoke("Hi")
    assert chat.model_copy(deep=True).invoke("Hi").response_metadata["backend"] == "remote"
