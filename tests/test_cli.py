"""The command `hfcore`."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfcore import Tokenizer, cli, fetch

FIGURES = (
    r"\[\d+ prompt tokens, \d+ completion tokens, first token after [\d.]+ s, [\d.]+ tokens/s\]"
)
SHORT = ["--max-tokens", "4", "--temperature", "0"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hfcore", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_chat_prints_the_answer_and_then_the_figures(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", str(tiny), "Hello", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert re.fullmatch(FIGURES, err.strip())


def test_chat_without_a_prompt_talks_and_remembers(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd then?\n"))
    assert cli.main(["chat", str(tiny), *SHORT]) == 0
    first, second = (int(n) for n in re.findall(r"\[(\d+) prompt", capsys.readouterr().err))
    assert second > first + len("And then?")


def test_a_prompt_may_come_from_stdin_and_be_plain_text(tiny: Path) -> None:
    raw = run("chat", str(tiny), "-", "--raw", *SHORT, stdin="Hello")
    chat = run("chat", str(tiny), "-", "--system", "Be brief.", *SHORT, stdin="Hello")
    counts = [int(re.findall(r"\[(\d+) prompt", r.stderr)[0]) for r in (raw, chat)]
    assert counts[0] < 10 < counts[1]


def test_demo_asks_the_fetched_model_and_prints_all_to_stdout(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetched(name: str) -> Path:
        asked.append(name)
        return tiny

    monkeypatch.setattr(fetch, "fetch", fetched)
    assert cli.main(["demo", "Hello", *SHORT]) == 0
    out, _ = capsys.readouterr()
    assert asked == ["smollm2"]
    assert re.fullmatch(FIGURES, out.splitlines()[-1])


def test_tokenize_prints_ids_and_tokens(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tokenize", str(tiny), "the end"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    ids = Tokenizer.from_path(tiny).encode("the end", add_special_tokens=False)
    assert [int(number) for number, _ in rows] == [int(i) for i in ids]


@pytest.mark.parametrize("given", ["Hi", '[{"role": "user", "content": "Hi"}]'])
def test_render_prints_the_prompt(
    tiny: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    assert cli.main(["render", str(tiny), given, "--system", "S"]) == 0
    assert capsys.readouterr().out == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_info_prints_what_the_model_is(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(tiny)]) == 0
    assert "architecture: llama" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["chat", "none.gguf", "x"], 1, "hfcore: none.gguf: no such file or directory"),
        (["chat", "{tiny}", "x", "--max-tokens", "0"], 2, "max_tokens"),
        (["chat", "{tiny}", "x", "--device", "cuda"], 1, "not supported yet"),
        (["render", "{tiny}", "[1]"], 2, "JSON list of objects"),
        (["render", "{tiny}", "[oops"], 2, "JSON list"),
        (["info", "gpt2"], 1, "owner/name"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str
) -> None:
    assert cli.main([a.format(tiny=tiny) if "{tiny}" in a else a for a in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["what"], ["chat"], ["chat", "m", "x", "--top-p", "a"]])
def test_a_wrong_command_line_is_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: hfcore" in capsys.readouterr().err


def test_ctrl_c_is_status_130_without_a_traceback(tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hfcore", "chat", str(tiny)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write("Hello\n")
    process.stdin.flush()
    assert process.stderr is not None
    assert re.match(FIGURES, process.stderr.readline())
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="a shell with pipes is needed")
def test_a_reader_that_had_enough_is_no_error(tiny: Path) -> None:
    command = (
        f"{sys.executable} -m hfcore tokenize {tiny} \"$(printf 'a b %.0s' $(seq 9000))\" | head -1"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_nothing_but_text_is_written_where_no_terminal_is(tiny: Path) -> None:
    result = run("chat", str(tiny), "Hello", *SHORT)
    assert "\x1b" not in result.stdout + result.stderr
    assert "\r" not in result.stdout + result.stderr


def test_the_package_is_light_to_import() -> None:
    program = (
        "import sys, hfcore, hfcore.cli\n"
        "heavy = {'langchain_core', 'numpy', 'huggingface_hub', 'asyncio', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "import hfcore.engine, hfcore.testing\n"
        "print('langchain_core' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stderr


def test_the_type_of_the_cache_reaches_the_engine(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = ["chat", str(tiny), "Hello", *SHORT, "--kv-cache-dtype"]
    assert cli.main([*chat, "int8"]) == 0
    capsys.readouterr()
    assert cli.main([*chat, "fp8"]) == 2
    assert "one of 'f16', 'int8', got 'fp8'" in capsys.readouterr().err
