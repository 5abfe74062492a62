"""benches/bench_nll.py: its figures are the engine's, and what it says of a rival's."""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hfcore import Engine, Tokenizer
from hfcore.bench import processes, report

ROOT = Path(__file__).resolve().parent.parent

# A llama_cpp of a tiny vocabulary to which the token that came is three times as likely as another.
LLAMA = """
import ctypes, numpy, os
class Llama:
    def __init__(self, model, n_ctx, logits_all, flash_attn, **options):
        FAIL
        assert logits_all and not flash_attn
        self.scores = numpy.zeros((n_ctx, 272), numpy.float32)
    def reset(self):
        self.scores[:] = 1e4
    def eval(self, ids):
        self.scores[range(len(ids) - 1), ids[1:]] += numpy.log(3)
def llama_print_system_info():
    return b""
"""


@pytest.fixture
def bench_nll(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benches")
    import bench_nll

    return bench_nll


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Arguments: a short text, and one of more tokens than are run."""
    (tmp_path / "short.txt").write_text("Half a word.", encoding="utf-8")
    (tmp_path / "long.txt").write_text("0123456789" * 300, encoding="utf-8")
    return ["--text", str(tmp_path / "short.txt"), str(tmp_path / "long.txt"), "--threads", "1"]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, fail: str = "pass") -> None:
    (folder / "llama_cpp.py").write_text(LLAMA.replace("FAIL", fail), encoding="utf-8")
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), path])))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_without_a_rival_the_nll_is_that_of_the_engines_prompt_logprobs(
    bench_nll: ModuleType, tiny: Path, tmp_path: Path, texts: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(
        processes, "RIVALS", {n: processes.Rival(n, ("no_such_module",)) for n in processes.RIVALS}
    )
    out = tmp_path / "new" / "nll.jsonl"
    assert bench_nll.main([str(tiny), *texts, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("not measured: llama-cpp-python: not installed (no module no_such_mod") == 1
    lines = lines_of(out)
    tokenizer = Tokenizer.from_path(tiny)
    with Engine(tiny, threads=1) as engine:
        for line, name in zip(lines[:2], ("short.txt", "long.txt"), strict=True):
            assert line["text"] == f"{name}, characters 0-3500"
            ids = tokenizer.encode((tmp_path / name).read_text("utf-8"))[:1500]
            assert line["tokens"] == len(ids)
            first, *_ = engine.stream(ids, max_tokens=1, prompt_logprobs=True)
            nll = -statistics.fmean(each.logprob for each in first.prompt_logprobs or ())
            assert line["nll"] == pytest.approx({"hfcore": nll}, abs=1e-6)
    mean = lines[2]
    assert (len(lines), mean["text"], mean["difference"]) == (3, None, None)
    assert mean["nll"]["hfcore"] == pytest.approx(
        statistics.fmean(line["nll"]["hfcore"] for line in lines[:2]), abs=1e-5
    )
    assert "met" not in mean
    assert {"commit", "cpu", "versions", "date", "command"} <= mean.keys()
    assert "no module no_such_module" in report.table(report.read([out]))


def test_a_rival_gets_the_same_ids_and_its_scores_become_log_probabilities(
    bench_nll: ModuleType, tiny: Path, tmp_path: Path, texts: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stand_in(tmp_path, monkeypatch)
    out = tmp_path / "nll.jsonl"
    assert bench_nll.main([str(tiny), *texts, "--out", str(out)]) == 0
    lines = lines_of(out)
    theirs = math.log(274 / 3)
    for line in lines:
        ours = line["nll"]["hfcore"]
        # The stand-in's scores are large and of float32.
        assert line["nll"]["llama-cpp-python"] == pytest.approx(theirs, abs=1e-3)
        assert line["difference"] == pytest.approx(ours / theirs - 1, abs=1e-3)
    assert (lines[-1]["bar"], lines[-1]["met"]) == (0.005, False)  # noise knows nothing
    assert "bar +0.5%: NOT MET" in capsys.readouterr().out


def test_a_rival_that_fails_is_said_and_hfcore_stands_alone(
    bench_nll: ModuleType, tiny: Path, tmp_path: Path, texts: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stand_in(tmp_path, monkeypatch, fail="raise ValueError('no such architecture')")
    out = tmp_path / "nll.jsonl"
    assert bench_nll.main([str(tiny), *texts, "--out", str(out)]) == 0
    assert [set(line["nll"]) for line in lines_of(out)] == [{"hfcore"}] * 3
    reason = "ended with status 1: ValueError: no such architecture"
    assert f"  not measured: llama-cpp-python: {reason}\n" in capsys.readouterr().out


def test_a_text_of_one_token_is_an_error(
    bench_nll: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    arguments = [str(tiny), "--text", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "x")]
    assert bench_nll.main(arguments) == 1
    assert "empty.txt, characters 0-3500: wanted at least 2 tokens" in capsys.readouterr().err


def test_the_texts_of_this_repository_are_there(bench_nll: ModuleType) -> None:
    found = bench_nll.texts([])
    assert len(dict(found)) == len(found) == 7
    assert all(1000 < len(text) <= bench_nll.PIECE for _, text in found)
