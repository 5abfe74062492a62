"""hfcore under the name of langchain_huggingface: each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from servers.recording import Recording

from hfcore.testing import tiny_encoder, tiny_model

INSTALL = "import hfcore; hfcore.install_as_langchain_huggingface()\n"

NAMES = {
    "": "ChatHuggingFace HuggingFaceEmbeddings HuggingFaceEndpoint HuggingFaceEndpointEmbeddings"
    " HuggingFacePipeline __version__",
    "._version": "__version__",
    ".chat_models": "ChatHuggingFace",
    ".chat_models.huggingface": "ChatHuggingFace HuggingFaceEndpoint HuggingFacePipeline",
    ".llms": "HuggingFaceEndpoint HuggingFacePipeline",
    ".llms.huggingface_pipeline": "HuggingFacePipeline",
    ".llms.huggingface_endpoint": "HuggingFaceEndpoint",
    ".embeddings": "HuggingFaceEmbeddings HuggingFaceEndpointEmbeddings",
    ".embeddings.huggingface": "HuggingFaceEmbeddings",
    ".embeddings.huggingface_endpoint": "HuggingFaceEndpointEmbeddings",
}
"""What programs import, and from where."""


def run(program: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, warnings as errors; `path` comes first among its paths."""
    before = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    command = [sys.executable, "-W", "error", "-c", before + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def printed(program: str, path: Path | None = None) -> str:
    done = run(program, path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_imported_is_hfcores() -> None:
    program = "".join(
        f"from langchain_huggingface{module} import {name}\n"
        f"if {name} is not hfcore.{name}: print({module!r}, {name!r})\n"
        for module, names in NAMES.items()
        for name in names.split()
    )
    assert printed(INSTALL + program) == ""


def test_modules_are_reached_by_attribute_and_by_import() -> None:
    program = (
        "import langchain_huggingface, langchain_huggingface.utils.import_utils, importlib.util\n"
        "print(langchain_huggingface.llms.huggingface_pipeline.HuggingFacePipeline.__module__,\n"
        "      importlib.util.find_spec('langchain_huggingface.llms').name,\n"
        "      'ChatHuggingFace' in dir(langchain_huggingface))"
    )
    assert printed(INSTALL + program) == "hfcore.llms langchain_huggingface.llms True"


def test_installing_imports_neither_langchain_nor_the_hub() -> None:
    program = (
        "import sys\n"
        "print(*sorted({'langchain_core', 'huggingface_hub', 'pydantic'} & set(sys.modules)))"
    )
    assert printed(INSTALL + program) == ""


@pytest.mark.parametrize(
    "wanted",
    [
        "import langchain_huggingface.nothing",
        "from langchain_huggingface import ChatHuggingfaces",
        "from langchain_huggingface.chat_models.huggingface import _convert_message_to_dict",
    ],
)
def test_what_is_not_here_is_an_import_error(wanted: str) -> None:
    program = f"try:\n    {wanted}\nexcept ImportError as error:\n    print('refused', error)"
    assert printed(INSTALL + program).startswith("refused")


def test_it_is_said_once_in_the_log() -> None:
    program = "import logging; logging.basicConfig(level='INFO')\n" + INSTALL + INSTALL
    done = run(program)
    assert done.returncode == 0
    assert done.stderr.count("langchain_huggingface is hfcore's in this process") == 1


def test_the_real_package_imported_before_is_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "langchain_huggingface.py").write_text("class ChatHuggingFace: ...\n")
    program = (
        "import langchain_huggingface, hfcore\n"
        "try:\n    hfcore.install_as_langchain_huggingface()\n"
        "except hfcore.InvalidRequestError as error:\n    print(error)"
    )
    words = printed(program, tmp_path)
    assert "must not be imported before" in words
    assert str(tmp_path / "langchain_huggingface.py") in words


def test_the_real_package_installed_but_not_imported_gives_way(tmp_path: Path) -> None:
    (tmp_path / "langchain_huggingface.py").write_text("raise RuntimeError\n")
    program = "import langchain_huggingface as it; print(it.ChatHuggingFace.__module__)"
    assert printed(INSTALL + program, tmp_path) == "hfcore.chat_models"


def test_langchains_own_ways_to_name_a_provider_give_hfcore(tmp_path: Path) -> None:
    model, encoder = tiny_model(tmp_path), tiny_encoder(tmp_path / "encoder")
    program = (
        "from langchain.chat_models import init_chat_model\n"
        "from langchain.embeddings import init_embeddings\n"
        f"chat = init_chat_model({str(model)!r}, model_provider='huggingface', max_tokens=4)\n"
        "print(chat.invoke('Hello').usage_metadata['output_tokens'])\n"
        f"texts = init_embeddings({str(encoder)!r}, provider='huggingface')\n"
        "print(len(texts.embed_query('Hello')))"
    )
    assert printed(INSTALL + program).split() == ["4", "32"]


def test_langchains_name_of_the_provider_reaches_a_server_too() -> None:
    with Recording() as server:
        program = (
            "from langchain.chat_models import init_chat_model\n"
            f"chat = init_chat_model({server.url + '/v1'!r}, model_provider='huggingface',"
            " backend='endpoint', temperature=0)\n"
            "print(chat.invoke('Hello').text)"
        )
        assert printed(INSTALL + program) == "You said: Hello"
        assert server.last.json["temperature"] == 0
