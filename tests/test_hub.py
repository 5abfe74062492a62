"""From a model's name to local files: a hub on the loopback interface, and no hub at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hfcore import hub
from hfcore.errors import InvalidRequestError, ModelFileError, ModelNotFoundError

SHA = "c0ffee" + "0" * 34
REPOS = {
    "owner/gguf": ["README.md", "mmproj-F16.gguf", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf"],
    "owner/split": [f"Q8_0/m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)],
    "owner/tensors": ["config.json", "model.safetensors", "tokenizer.json", "onnx/model.onnx"],
    "owner/pickled": ["config.json", "pytorch_model.bin"],
}
TOKEN = "hf_" + "s3cret" * 4


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a download needs. Remembers every request and token."""

    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.seen.append((f"{self.command} {path}", self.headers.get("Authorization")))
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/").split("/"))
        else:
            owner, name, _, _, file = path.removeprefix("/").split("/", 4)
            self._file(f"{owner}/{name}", file)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def _api(self, parts: list[str]) -> None:
        repo = "/".join(parts[:2])
        if repo == "owner/gated" and not self.headers.get("Authorization"):
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repo not in REPOS:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif len(parts) > 2 and parts[3] not in ("main", SHA):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "tree" in parts:
            self._json([{"type": "file", "path": f, "size": len(f), "oid": sha1(f)}
                        for f in REPOS[repo]])  # fmt: skip
        else:
            self._json(
                {"id": repo, "sha": SHA,
                 "siblings": [{"rfilename": f, "size": len(f)} for f in REPOS[repo]]}
            )  # fmt: skip

    def _file(self, repo: str, file: str) -> None:
        if file not in REPOS.get(repo, ()):
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(200, file.encode(), {"ETag": f'"{sha1(file)}"', "X-Repo-Commit": SHA})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def sha1(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Client:
    """hfcore.hub.resolve in a process of its own, as the environment is read at import."""

    def __init__(self, home: Path, server: ThreadingHTTPServer) -> None:
        self.home, self.server = home, server
        self.seen: list[tuple[str, str | None]] = []
        server.RequestHandlerClass = type("Seen", (Hub,), {"seen": self.seen})

    def resolve(
        self, model: str, *, environment: dict[str, str] | None = None, ask: str = "resolve",
        **options: Any,
    ) -> str:  # fmt: skip
        """The path below the snapshot, or "ErrorClass: message"; `ask`: another question."""
        program = (
            "import json, sys\nfrom hfcore import hub\nmodel, options = json.load(sys.stdin)\n"
            f"try: print(hub.{ask}(model, **options))\n"
            "except Exception as error: print(f'{type(error).__name__}: {error}')\n"
        )
        host, port = self.server.server_address[:2]
        result = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps([model, options]), capture_output=True, text=True, timeout=60,
            env={
                **{n: v for n, v in os.environ.items() if not n.startswith("HF_")},
                "HF_ENDPOINT": f"http://{host!s}:{port}", "HF_HOME": str(self.home),
                "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **(environment or {}),
            },
        )  # fmt: skip
        assert TOKEN not in result.stdout + result.stderr
        assert result.returncode == 0, result.stderr
        return result.stdout.strip().partition(f"snapshots/{SHA}")[2].lstrip("/") or (
            "" if SHA in result.stdout else result.stdout.strip()
        )


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Client(tmp_path, server)
    server.shutdown()
    server.server_close()
    thread.join()


def test_of_several_files_the_usual_quantization_is_downloaded_and_no_other(client: Client) -> None:
    assert client.resolve("owner/gguf") == "m-Q4_K_M.gguf"
    fetched = {path for path, _ in client.seen if path.startswith("GET /owner")}
    assert fetched == {f"GET /owner/gguf/resolve/{SHA}/m-Q4_K_M.gguf"}


def test_how_large_a_model_is_can_be_known_before_it_is_fetched(client: Client) -> None:
    def size(model: str, **options: Any) -> str:
        return client.resolve(model, ask="bytes_to_fetch", **options)

    assert size("owner/gguf:q8_0") == str(len("m-Q8_0.gguf"))
    assert size("owner/tensors") == str(sum(map(len, REPOS["owner/tensors"][:3])))
    assert not any("/resolve/" in path for path, _ in client.seen)
    assert size("owner/tensors:q8_0") == "0"  # it would be quantised as it is loaded
    for unknown in ("owner/none", "owner/pickled", "./a.gguf"):
        assert size(unknown) == "None"
    assert size("owner/gguf", environment={"HF_HUB_OFFLINE": "1"}) == "None"
    client.resolve("owner/gguf:q8_0")
    assert size("owner/gguf:q8_0") == "None"  # it is here


def test_a_quantization_after_the_colon_is_taken(client: Client) -> None:
    assert client.resolve("owner/gguf:q8_0") == "m-Q8_0.gguf"
    missing = client.resolve("owner/gguf:Q5_K_M")
    assert missing.startswith("ModelNotFoundError")
    assert "it has Q2_K, Q4_K_M, Q8_0" in missing


def test_all_parts_of_a_split_file_come(client: Client) -> None:
    assert client.resolve("owner/split") == "Q8_0/m-Q8_0-00001-of-00002.gguf"
    assert sum(path.startswith("GET /owner") for path, _ in client.seen) == 2


def test_without_gguf_the_safetensors_model_comes(client: Client) -> None:
    assert client.resolve("owner/tensors") == ""
    fetched = {path.rsplit("/", 1)[1] for path, _ in client.seen if path.startswith("GET /owner")}
    assert fetched == {"config.json", "model.safetensors", "tokenizer.json"}
    assert "pytorch_model.bin" in client.resolve("owner/pickled")


def test_what_was_fetched_serves_offline_and_when_the_hub_is_gone(client: Client) -> None:
    client.resolve("owner/gguf")
    before = len(client.seen)
    assert client.resolve("owner/gguf", environment={"HF_HUB_OFFLINE": "1"}) == "m-Q4_K_M.gguf"
    assert client.resolve("owner/gguf", local_files_only=True) == "m-Q4_K_M.gguf"
    assert len(client.seen) == before
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert client.resolve("owner/gguf", environment=nowhere) == "m-Q4_K_M.gguf"
    absent = client.resolve("owner/gguf:Q8_0", local_files_only=True)
    assert absent.startswith("ModelNotFoundError")
    assert "Q8_0" in absent


def test_offline_without_a_copy_is_said_at_once(client: Client) -> None:
    said = client.resolve("owner/gguf", environment={"HF_HUB_OFFLINE": "1"})
    assert said.startswith("ModelNotFoundError: owner/gguf: not in the local cache")
    assert client.seen == []


def test_a_hub_out_of_reach_is_said(client: Client) -> None:
    said = client.resolve("owner/gguf", environment={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert said.startswith("ModelNotFoundError: owner/gguf: could not be fetched")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("owner/none", "no such model on the hub, or it is private"),
        ("owner/gated", "is gated: accept its terms at https://huggingface.co/owner/gated"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(
    client: Client, model: str, words: str
) -> None:
    said = client.resolve(model)
    assert said.startswith("ModelNotFoundError")
    assert words in said


def test_a_revision_that_does_not_exist_is_said(client: Client) -> None:
    assert "no such revision" in client.resolve("owner/gguf", revision="v9")


def test_the_token_goes_to_the_hub_and_nowhere_else(client: Client) -> None:
    client.resolve("owner/gguf", token=TOKEN)
    assert {token for _, token in client.seen} == {f"Bearer {TOKEN}"}
    assert TOKEN not in client.resolve("owner/none", token=TOKEN)


@pytest.mark.parametrize("name", ["/no/such", "./none", "~/none", "none.gguf", "owner/none.gguf"])
def test_a_name_that_looks_local_never_goes_to_the_hub(client: Client, name: str) -> None:
    said = client.resolve(name)
    assert said.startswith(f"ModelNotFoundError: {name}: no such file or directory")
    assert client.seen == []


def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "any.bin"
    file.touch()
    assert hub.resolve(file) == file


def test_of_a_directory_the_quantization_asked_for_is_taken(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).touch()
    assert hub.resolve(tmp_path).name == "a-Q4_K_M.gguf"
    assert hub.resolve(f"{tmp_path}:Q8_0").name == "a-Q8_0.gguf"
    assert hub.resolve(tmp_path, quantization="q8_0").name == "a-Q8_0.gguf"
    with pytest.raises(InvalidRequestError, match="differ"):
        hub.resolve(f"{tmp_path}:Q8_0", quantization="Q4_K_M")


def test_a_safetensors_directory_is_taken_whole(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert hub.resolve(tmp_path) == tmp_path
    # There is nothing to choose by it: it is made as the model is loaded.
    assert hub.resolve(tmp_path, quantization="Q8_0") == tmp_path
    assert hub.left_to_make(tmp_path, tmp_path, "Q8_0") == "Q8_0"


def test_an_empty_directory_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither \.gguf nor \.safetensors"):
        hub.resolve(tmp_path)


def test_a_missing_part_is_noticed() -> None:
    with pytest.raises(ModelFileError, match="one of 3 parts, 2 are there"):
        hub.choose(["m-00001-of-00003.gguf", "m-00002-of-00003.gguf"], None, "m")


def test_names_that_tell_nothing_must_be_named() -> None:
    assert hub.choose(["only.gguf"], None, "m") == ["only.gguf"]
    with pytest.raises(ModelNotFoundError, match="2 models; name a file"):
        hub.choose(["one.gguf", "two.gguf"], None, "m")


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "owner/na me", "http://x/y"])
def test_a_name_that_is_neither_path_nor_model_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="owner/name"):
        hub.resolve(name)


def test_a_foreign_token_is_refused_without_showing_it() -> None:
    with pytest.raises(InvalidRequestError, match="token must be a str or SecretStr, got int"):
        hub.resolve("owner/name", token=12345, local_files_only=True)
