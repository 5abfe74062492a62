"""`hfcore bench --text`: its lines, who is told wrong, and its table. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint

from hfcore import cli
from hfcore.bench import texts
from hfcore.errors import InvalidRequestError, ModelNotFoundError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

# A `tokenizers` with ids of its own.
WRONG = """
class Encoding:
    def __init__(self, text): self.ids = list(range(len(text)))
class Tokenizer:
    @classmethod
    def from_file(cls, path): return cls()
    def encode(self, text, *args, **kwargs): return Encoding(text)
    def encode_batch(self, texts, *args, **kwargs): return [Encoding(t) for t in texts]
    def no_truncation(self): pass
    def no_padding(self): pass
"""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A tokenizer, a template, and a folder of two texts."""
    tokenizer, template = tmp_path / "tiny.json", tmp_path / "plain.jinja"
    tiny_checkpoint.tokenizer().save(str(tokenizer))
    template.write_text(TEMPLATE, encoding="utf-8")
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in (("a", "One two three, four."), ("b", "Été 42\n" * 20)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return [tokenizer, template, folder]


def bench(*arguments: str | Path) -> int:
    return cli.main(["bench", "--text", *map(str, arguments)])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_measure_is_there_with_each_rounds_value(files: list[Path], tmp_path: Path) -> None:
    out, table = tmp_path / "lines.jsonl", tmp_path / "text.md"
    arguments = ("--rivals", "none", "--rounds", "2", "--out", out, "--table", table)
    assert bench(*files, *arguments) == 0
    lines = lines_of(out)
    measured = {(line["kind"], line.get("what") or line.get("messages")) for line in lines}
    assert measured == {
        *(("tokens", what) for what in ("load", "first", "again", "message", "batch")),
        ("template", 3), ("template", 60), ("cold", None),
    }  # fmt: skip
    for line in lines:
        assert line["engine"] == "hfcore"
        assert len(line["rounds"]) == 2
        assert all(seconds > 0 for seconds in line["rounds"])
        assert {"commit", "cpu", "versions", "command", "date"} <= line.keys()
    first = next(line for line in lines if line.get("what") == "first")
    read = sum(path.stat().st_size for path in files[2].iterdir())
    assert (first["texts"], first["bytes"], first["wrong"]) == (2, read, 0)
    said = table.read_text(encoding="utf-8")
    assert "| tiny | hfcore | 0 of 2 |" in said
    assert "| plain | 60 |" in said
    again = tmp_path / "again.md"
    assert bench("--report", out, "--table", again) == 0
    assert again.read_text(encoding="utf-8") == said


def test_who_gives_other_ids_is_counted_against_tokenizers(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = tmp_path / "stand-ins"
    (stand_ins / "tokenizers-9.9.dist-info").mkdir(parents=True)
    (stand_ins / "tokenizers.py").write_text(WRONG, encoding="utf-8")
    metadata = "Metadata-Version: 2.1\nName: tokenizers\nVersion: 9.9\n"
    (stand_ins / "tokenizers-9.9.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(stand_ins))
    out = tmp_path / "lines.jsonl"
    arguments = ("--rivals", "tokenizers", "--rounds", "1", "--out", out)
    assert bench(files[0], files[2], *arguments) == 0
    wrong = {line["engine"]: line["wrong"] for line in lines_of(out) if line.get("what") == "first"}
    assert wrong == {"hfcore": 2, "tokenizers": 0}


def test_rivals_that_are_not_installed_are_said(files: list[Path], tmp_path: Path) -> None:
    out, table = tmp_path / "lines.jsonl", tmp_path / "text.md"
    arguments = ("--rivals", "kitoken", "--rounds", "1", "--out", out, "--table", table)
    assert bench(files[1], *arguments) == 0
    absent = [line for line in lines_of(out) if line["kind"] == "absent"]
    if not absent:
        pytest.skip("kitoken is installed here")
    assert "kitoken" in absent[0]["reason"]
    assert f"- kitoken: {absent[0]['reason']}" in table.read_text(encoding="utf-8")


def test_what_is_no_text_bench_is_refused(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidRequestError, match=r"wants \.txt files"):
        _run(files[0])
    with pytest.raises(InvalidRequestError, match="wants a tokenizer"):
        _run(files[2])
    with pytest.raises(InvalidRequestError, match="'tokenisers'"):
        _run(*files, rivals="tokenisers")
    with pytest.raises(ModelNotFoundError, match="no such file"):
        _run(tmp_path / "none.json")
    assert bench(tmp_path / "none.json") != 0
    assert "no such file" in capsys.readouterr().err


def _run(*paths: Path, rivals: str = "none") -> None:
    from argparse import Namespace

    texts.run(
        Namespace(
            models=[*paths], rounds=1, out=None, rivals=rivals, rival_python=[], report=None,
            table=None,
        )
    )  # fmt: skip
