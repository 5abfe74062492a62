"""`hfcore bench`: the shape of its lines, what it says of who is not there, and its reports.

No time is asserted. Rivals are stand-ins: modules of a rival's name that do what the test is about.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hfcore import Engine, _core, cli
from hfcore.bench import machine, measures, model, processes, report, session, worker
from hfcore.errors import HfcoreError, InvalidRequestError, ModelFileError
from hfcore.testing import tiny_model

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--threads", "1", "--rounds", "2", "--new", "4", "--read-bytes", "4194304"]
SMALL = ["--prefill", "8,24", "--depth", "0,8", "--batch", "1,3"]
CIRCUMSTANCES = {
    "commit", "changed_files", "cpu", "cpu_flags", "platform", "python", "command", "versions",
    "threads", "date", "load_average", "model", "model_sha256", "model_bytes", "limits",
}  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bench(*arguments: str | Path) -> int:
    return cli.main(["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def results(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lines of a run without rivals."""
    out = tmp_path_factory.mktemp("bench") / "new" / "lines.jsonl"
    table = out.with_suffix(".md")
    assert bench(tiny, *QUICK, *SMALL, "--rivals", "none", "--out", out, "--table", table) == 0
    return out


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a module in a rival's place, for this process's workers."""

    def install(module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        path = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), path])))

    return install


# A llama_cpp that "decodes" at once. `EVAL` is what happens before.
LLAMA = """
import ctypes, os, sys, time
LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
class Llama:
    def __init__(self, model, **options):
        self.ctx, self.model = None, None
        if not options["flash_attn"]:
            raise ValueError("no plain attention in " + model)
    def reset(self): pass
    def n_vocab(self): return 4
    def eval(self, ids):
        EVAL
        time.sleep(0.001)
def llama_print_system_info():
    return b"CPU : AVX = 1 | AVX2 = 1 | "
def llama_get_logits_ith(context, row):
    return (ctypes.c_float * 4)(0, 1, 0, 0)
"""


# --- a run ----------------------------------------------------------------------------------------


def test_every_line_carries_what_one_must_know_to_judge_it(results: Path, tiny: Path) -> None:
    lines = lines_of(results)
    for line in lines:
        assert line.keys() >= CIRCUMSTANCES
        assert (line["model"], line["model_bytes"]) == (tiny.name, tiny.stat().st_size)
        assert len(line["model_sha256"]) == 16
        assert line["limits"]["read_bytes_per_second"] > 0
        assert str(Path.home()) not in json.dumps(line)
        assert str(tiny.parent) not in json.dumps(line)
    assert lines[0]["kind"] == "limits"


def test_every_measure_is_there_with_each_rounds_value(results: Path) -> None:
    found = {(x["measure"], x["size"]): x for x in lines_of(results) if x["kind"] == "measure"}
    assert set(found) == {
        ("prefill", 8), ("prefill", 24), ("decode", 0), ("decode", 8), ("batch", 1), ("batch", 3),
        ("first token, cold", None), ("first token, warm", None),
        ("peak memory, first token", None), ("peak memory, longest prompt", None),
    }  # fmt: skip
    for (measure, _), line in found.items():
        assert len(line["rounds"]) == (1 if measure == "peak memory, longest prompt" else 2)
        assert min(line["rounds"]) > 0
        assert line["engine"] == "hfcore"
        assert "ratio" not in line
        assert ("share" in line) == (measure in {"prefill", "decode"})


def test_the_share_is_the_rate_by_what_the_limits_allow(results: Path, tiny: Path) -> None:
    facts = model.read(tiny)
    for measure, name, cost in (
        ("decode", "read_bytes_per_second", facts.token_bytes),
        ("prefill", "int8_operations_per_second", 2 * facts.layer_parameters),
    ):
        line = next(x for x in lines_of(results) if x.get("measure") == measure)
        each = [
            rate * cost / limit
            for rate, limit in zip(line["rounds"], line["limit_rounds"][name], strict=True)
        ]
        wanted = {"median": statistics.median(each), "least": min(each), "most": max(each)}
        assert line["share"] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert line["limit"] * cost == pytest.approx(
            statistics.median(line["limit_rounds"][name]), rel=1e-3
        )


def test_the_limits_are_measured_before_and_after_each_request_and_the_better_counts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the model's beginning, the warm-up, and two rounds.
    reached = iter([9e9, 8e9, 8e9, 5e9, 4e9, 2e9, 3e9])

    def limits(*_: object) -> dict[str, Any]:
        found = next(reached)
        return LIMITS | {"read_bytes_per_second": found, "int8_operations_per_second": 100 * found}

    monkeypatch.setattr(machine, "limits", limits)
    out = tmp_path / "lines.jsonl"
    sizes = ["--prefill", "8", "--depth", "8", "--batch", "none", "--rates-only"]
    assert bench(tiny, *QUICK, *sizes, "--rivals", "none", "--out", out) == 0
    found = {line["measure"]: line["limit_rounds"] for line in lines_of(out) if "rounds" in line}
    assert found == {
        "prefill": {"int8_operations_per_second": [5e11, 3e11]},
        "decode": {"read_bytes_per_second": [5e9, 3e9]},
    }


def test_a_limit_is_read_from_far_more_than_the_last_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def limits(threads: int, read_bytes: int) -> dict[str, Any]:
        sizes.append(read_bytes)
        return {"threads": threads}

    monkeypatch.setattr(_core, "limits", limits)
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    monkeypatch.setattr(machine, "free_memory", lambda: 4 << 30)
    machine.limits(1)
    for index, size in enumerate(["32K", "65536K", "unknown"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    machine.limits(1)
    machine.limits(1, 5 << 20)
    monkeypatch.setattr(machine, "free_memory", lambda: 400 << 20)
    assert machine.limits(1) == {"threads": 1, "read_bytes": 100 << 20}
    assert sizes == [256 << 20, 512 << 20, 5 << 20, 100 << 20]


def test_what_the_context_does_not_hold_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tiny_model(tmp_path, context_size=64)
    out = tmp_path / "lines.jsonl"
    sizes = ["--prefill", "8,64", "--depth", "none", "--batch", "none"]
    assert bench(short, *QUICK, *sizes, "--rivals", "none", "--out", out) == 0
    reasons = [line["reason"] for line in lines_of(out) if line["kind"] == "absent"]
    assert reasons == ["it needs 69 tokens of context, the model was made for 64"]
    assert reasons[0] in capsys.readouterr().out


# --- rivals ---------------------------------------------------------------------------------------


def test_rivals_that_are_not_installed_are_said(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        processes, "RIVALS", {n: processes.Rival(n, ("no_such_module",)) for n in processes.RIVALS}
    )
    out = tmp_path / "lines.jsonl"
    sizes = ["--prefill", "8", "--depth", "none", "--batch", "none"]
    assert bench(tiny, *QUICK, *sizes, "--out", out) == 0
    absent = {x["engine"]: x["reason"] for x in lines_of(out) if x["kind"] == "absent"}
    assert set(absent) == {"llama-cpp-python", "mistralrs", "openvino-genai", "transformers"}
    assert set(absent.values()) == {"not installed (no module no_such_module)"}
    assert "not measured: mistralrs: not installed" in capsys.readouterr().out


def test_a_rival_gives_ratios_and_a_mode_that_fails_is_said(
    tiny: Path, tmp_path: Path, stand_in: Any
) -> None:
    stand_in("llama_cpp", LLAMA.replace("EVAL", "print('chatter')"))
    out = tmp_path / "lines.jsonl"
    assert bench(tiny, *QUICK, *SMALL, "--rivals", "llama-cpp-python", "--out", out) == 0
    lines = lines_of(out)
    rival = [x for x in lines if x.get("engine") == "llama-cpp-python"]
    prefill = next(x for x in rival if x.get("measure") == "prefill" and x["size"] == 8)
    ours = next(x for x in lines if x.get("measure") == "prefill" and x["engine"] == "hfcore")
    assert prefill["mode"] == "flash attention"
    each = sorted(a / b for a, b in zip(ours["rounds"], prefill["rounds"], strict=True))
    assert prefill["ratio"]["least"] == pytest.approx(each[0], rel=1e-3)
    assert prefill["ratio"]["most"] == pytest.approx(each[-1], rel=1e-3)
    absent = [(x["mode"], x["measure"], x["reason"]) for x in rival if x["kind"] == "absent"]
    cold = next(reason for mode, what, reason in absent if what == "first token, cold")
    assert cold == "ended with status 1: ValueError: no plain attention in tiny.gguf"
    # Its batch needs what the stand-in has not; hfcore's is there all the same.
    assert {what for _, what, _ in absent} == {"first token, cold", "batch of 1", "batch of 3"}
    assert any(x.get("measure") == "batch" and x["engine"] == "hfcore" for x in lines)


def test_a_worker_that_dies_is_said_with_its_last_word_and_the_run_goes_on(
    tiny: Path, tmp_path: Path, stand_in: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    dies = "if len(ids) == 24: sys.stderr.write('first\\nout of luck\\n'); os._exit(3)"
    stand_in("llama_cpp", LLAMA.replace("EVAL", dies))
    out = tmp_path / "lines.jsonl"
    sizes = ["--prefill", "8,24,40", "--depth", "none", "--batch", "none"]
    assert bench(tiny, *QUICK, *sizes, "--rivals", "llama-cpp-python", "--out", out) == 0
    rival = [x for x in lines_of(out) if x.get("mode") == "flash attention"]
    assert [(x["measure"], x["reason"]) for x in rival if x["kind"] == "absent"] == [
        ("prompt of 24", "ended with status 3: out of luck")
    ]
    sizes_done = {x["size"] for x in rival if x.get("measure") == "prefill"}
    assert sizes_done == {8, 40}
    assert "prompt of 24: ended with status 3: out of luck" in capsys.readouterr().out


def test_what_would_take_longer_than_the_patience_is_not_begun(
    tiny: Path, tmp_path: Path, stand_in: Any
) -> None:
    slow = "assert len(ids) < 1024; time.sleep(0.4)"
    stand_in("llama_cpp", LLAMA.replace("EVAL", slow))
    out = tmp_path / "lines.jsonl"
    sizes = ["--prefill", "8,1024", "--depth", "none", "--batch", "none", "--patience", "20"]
    assert bench(tiny, *QUICK, *sizes, "--rivals", "llama-cpp-python", "--out", out) == 0
    absent = [x for x in lines_of(out) if x.get("mode") == "flash attention" and "reason" in x]
    assert [x["measure"] for x in absent] == ["prompt of 1024"]
    assert "the limit is 20 s" in absent[0]["reason"]


def test_a_worker_that_does_not_answer_in_time_is_ended(tiny: Path, stand_in: Any) -> None:
    stand_in("llama_cpp", LLAMA.replace("EVAL", "time.sleep(60)"))
    with processes.Worker(
        "llama-cpp-python", {"flash_attn": True},
        python=sys.executable, model=tiny, threads=1, context=64,
    ) as slow:  # fmt: skip
        assert slow.loaded(30) >= 0
        with pytest.raises(processes.WorkerError, match="no answer within 0 s"):
            slow.ask({"do": "generate", "ids": [1], "new": 1}, 0.2)
        assert slow._process.poll() is not None


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs stopped processes")
def test_ctrl_c_ends_the_run_and_all_workers_at_once(
    tiny: Path, tmp_path: Path, stand_in: Any
) -> None:
    pids = tmp_path / "pids"
    note = f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(50)"
    stand_in("llama_cpp", LLAMA.replace("EVAL", note))
    process = subprocess.Popen(
        [sys.executable, "-m", "hfcore", "bench", str(tiny), *QUICK, "--rivals=llama-cpp-python"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    for pid in {int(word) for word in pids.read_text().split()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_finds_no_module_of_ours_by_a_rivals_name() -> None:
    program = (
        f"import runpy, sys; sys.argv = ['worker', 'no', 'm', '1', '1', '{{}}']\n"
        f"sys.path.insert(0, {str(processes.WORKER.parent)!r})\n"
        f"try: runpy.run_path({str(processes.WORKER)!r}, run_name='__main__')\n"
        f"except KeyError: print({str(processes.WORKER.parent)!r} in sys.path, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stderr.strip() == "False"


def test_an_adapter_for_every_rival_and_no_other() -> None:
    assert list(worker.ADAPTERS) == list(processes.RIVALS)


# --- disturbed, held to an instruction set, of any type ------------------------------------------

NONE = ["--prefill", "none", "--depth", "none", "--batch", "none", "--rates-only"]
needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="cannot hold a process to some CPUs here"
)


def test_rates_only_leaves_out_first_tokens_and_memory(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    assert bench(tiny, *QUICK, *SMALL, "--rates-only", "--rivals", "none", "--out", out) == 0
    found = {line["measure"] for line in lines_of(out) if line["kind"] == "measure"}
    assert found == {"prefill", "decode", "batch"}


@needs_affinity
def test_stress_is_hfcore_beside_itself_undisturbed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lines.jsonl"
    assert bench(tiny, *QUICK, *NONE, "--stress", "--rivals", "none", "--out", out) == 0
    lines = [line for line in lines_of(out) if line["kind"] == "measure"]
    assert [line["measure"] for line in lines] == [
        "prefill, twice the threads", "prefill, a CPU busy",
        "decode, twice the threads", "decode, a CPU busy",
    ]  # fmt: skip
    for line in lines:
        assert (line["size"], line["engine"]) == (512, "hfcore")
        each = [a / b for a, b in zip(line["rounds"], line["undisturbed"], strict=True)]
        part = line["of_undisturbed"]
        assert [part["least"], part["most"]] == pytest.approx([min(each), max(each)], rel=1e-2)
    said = capsys.readouterr().out
    assert "| decode at depth 512, twice the threads | " in said
    assert " of undisturbed (" in said


@needs_affinity
def test_stress_without_enough_cpus_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "usable_cpus", list)
    out = tmp_path / "lines.jsonl"
    assert (
        bench(tiny, *QUICK, *SMALL, "--rates-only", "--stress", "--rivals=none", "--out", out) == 0
    )
    reasons = {x["measure"]: x["reason"] for x in lines_of(out) if x["kind"] == "absent"}
    assert reasons == {
        "stress": "it needs 1 CPUs to hold a process to and 2 new tokens, there are 0 and 4"
    }


@needs_affinity
def test_a_busy_process_keeps_to_its_cpus_and_ends_with_its_block() -> None:
    cpus = processes.usable_cpus()[:1]
    with processes.busy(cpus) as pid:
        assert os.sched_getaffinity(pid) == set(cpus)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@needs_affinity
def test_a_busy_process_ends_with_the_harness_that_was_killed() -> None:
    program = (
        "import os, signal\nfrom hfcore.bench import processes as p\n"
        "with p.busy(p.usable_cpus()[:1]) as pid:\n"
        "    print(pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    status, deadline = Path(f"/proc/{int(run.stdout)}/stat"), time.monotonic() + 20

    def alive() -> bool:
        # One that has ended may wait for whoever is its parent now.
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"

    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


# A hfcore that runs the instruction set SET and decodes at once.
OURS = """
import os, time, types
class Engine:
    def __init__(self, model, **options):
        self.info = {"instruction_set": SET}
    def stream(self, ids, max_tokens, **options):
        for _ in range(max_tokens):
            time.sleep(0.001)
            yield types.SimpleNamespace(token_ids=[1])
"""
LIMITS = {"threads": 1, "read_bytes_per_second": 4e10, "int8_operations_per_second": 2e12}


@pytest.mark.parametrize(
    ("isa", "set_", "absent"),
    [
        ("avx2", "os.environ['HFCORE_ISA']", {}),
        ("avx2", "'avx512vnni'",
         {"hfcore": "wanted the instruction set avx2, it runs avx512vnni"}),
        ("scalar", "os.environ['HFCORE_ISA']",
         {"llama-cpp-python": "wanted the instruction set scalar, it runs avx2"}),
    ],
)  # fmt: skip
def test_who_is_not_held_to_the_instruction_set_is_left_out(
    tiny: Path, tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch,
    isa: str, set_: str, absent: dict[str, str],
) -> None:  # fmt: skip
    monkeypatch.setattr(machine, "limits", lambda *_: LIMITS)
    stand_in("hfcore", OURS.replace("SET", set_))
    stand_in("llama_cpp", LLAMA.replace("EVAL", "").replace('not options["flash_attn"]', "False"))
    out = tmp_path / "lines.jsonl"
    arguments = [*QUICK, "--rates-only", "--prefill=8", "--depth=none", "--batch=none"]
    rival = ["--rivals", "llama-cpp-python"]
    assert bench(tiny, *arguments, *rival, "--isa", isa, "--out", out) == 0
    lines = lines_of(out)
    assert {line["isa"] for line in lines} == {isa}
    assert {x["engine"]: x["reason"] for x in lines if x["kind"] == "absent"} == absent
    measured = {x["engine"]: x["instruction_set"] for x in lines if x["kind"] == "measure"}
    assert measured == {name: isa for name in ("hfcore", "llama-cpp-python") if name not in absent}


def test_who_does_not_say_its_instruction_set_is_left_out_where_one_is_wanted(
    tiny: Path, tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "limits", lambda *_: LIMITS)
    stand_in("hfcore", OURS.replace("SET", "'avx2'"))
    silent = LLAMA.replace("AVX2 = 1", "NEON = 1").replace("EVAL", "")
    stand_in("llama_cpp", silent)
    out = tmp_path / "lines.jsonl"
    arguments = [*QUICK, "--rates-only", "--prefill=8", "--depth=none", "--batch=none"]
    assert bench(tiny, *arguments, "--rivals=llama-cpp-python", "--isa=avx2", "--out", out) == 0
    reasons = {x["mode"]: x["reason"] for x in lines_of(out) if x["kind"] == "absent"}
    assert reasons["flash attention"] == (
        "wanted the instruction set avx2, it does not say which it runs"
    )


@pytest.mark.parametrize("before", [None, "scalar"])
def test_the_instruction_set_is_held_to_for_the_run_alone(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HFCORE_ISA", raising=False)
    if before is not None:
        monkeypatch.setenv("HFCORE_ISA", before)
    with session.held_to(None):
        assert os.environ.get("HFCORE_ISA") == before
    with session.held_to("avx2"):
        assert os.environ["HFCORE_ISA"] == "avx2"
    assert os.environ.get("HFCORE_ISA") == before


def bench_types(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = ROOT / "benches" / "bench_types.py"
    command = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_types_are_measured_one_after_the_other_and_leave_no_file(
    tiny: Path, tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    stand_in("llama_cpp", LLAMA.replace("EVAL", ""))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    out = tmp_path / "lines.jsonl"
    run = bench_types(
        tiny, *QUICK, "--prefill", "8", "--shape=tiny", "--types=F16,Q4_K", "--out", out
    )
    assert run.returncode == 0, run.stderr
    lines = lines_of(out)
    assert {(x["tensor_type"], x["model"], x["shape"]) for x in lines} == {
        ("F16", "tiny-F16.gguf", "tiny"), ("Q4_K", "tiny-Q4_K.gguf", "tiny"),
    }  # fmt: skip
    assert {(x["measure"], x["engine"]) for x in lines if x["kind"] == "measure"} == {
        (measure, engine)
        for measure in ("prefill", "decode")
        for engine in ("hfcore", "llama-cpp-python")
    }
    assert "\n| Q4_K | " in run.stdout
    assert not list(temporary.iterdir())


def test_a_type_that_is_not_known_is_refused_with_those_that_are(tiny: Path) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    run = bench_types(tiny, "--types=Q4_0,Q4")
    assert run.returncode == 2
    assert "wanted all, or some of F32, F16, BF16, Q4_0" in run.stderr
    assert "got 'Q4'" in run.stderr


def test_a_made_model_of_any_type_gives_finite_numbers_and_says_its_file_type(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    monkeypatch.syspath_prepend(ROOT / "benches")
    import make_model

    assert len(make_model.TYPES) == 16
    for kind in (None, *make_model.TYPES):
        path = tmp_path / "model.gguf"
        make_model.write(tiny, path, make_model.SHAPES["tiny"], kind)
        said = gguf.LlamaFileType(gguf.GGUFReader(path).fields["general.file_type"].contents())
        assert said.name.partition("_")[2].startswith(kind or "Q4_K_M")
        with Engine(path, threads=1, context_size=64) as engine:
            (delta,) = engine.stream([1, 2, 3], max_tokens=1, temperature=0, logprobs=True)
        assert delta.logprobs is not None
        assert math.isfinite(delta.logprobs[0].logprob)


# --- arithmetic -----------------------------------------------------------------------------------


def test_a_ratio_is_of_neighbouring_rounds_and_not_of_medians() -> None:
    assert measures.ratio([10, 1, 10], [5, 1, 1]) == {"median": 2.0, "least": 1.0, "most": 10.0}


def test_the_best_mode_has_most_tokens_or_least_seconds() -> None:
    slow, fast = [1.0, 9.0, 1.0], [2.0, 2.0, 2.0]
    assert measures.best([slow, fast], "tokens/s") == fast
    assert measures.best([slow, fast], "s") == slow
    assert measures.best([], "s") is None


def test_a_token_reads_the_embedding_only_where_it_is_the_head(tmp_path: Path) -> None:
    facts = model.read(tiny_model(tmp_path))
    embedding = 272 * 64
    matrices = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert facts.layer_parameters == matrices
    assert facts.parameters == matrices + 2 * embedding + 5 * 64
    q8 = 34 / 32
    assert facts.token_bytes == pytest.approx((matrices + embedding) * q8 + 5 * 64 * 4, rel=0.001)
    assert (facts.context_size, facts.vocab_size, facts.architecture) == (2048, 272, "llama")


@pytest.mark.parametrize("cut", [0, 3, 20, 200, 5000])
def test_a_file_that_is_no_whole_model_is_an_error(tiny: Path, tmp_path: Path, cut: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:cut])
    with pytest.raises(ModelFileError, match=r"broken\.gguf: wanted a GGUF file"):
        model.read(broken)


def test_a_files_counts_are_not_believed(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64)
    with pytest.raises(ModelFileError, match="a count of"):
        model.read(broken)


# --- reports --------------------------------------------------------------------------------------


def line(engine: str, value: float, **others: Any) -> dict[str, Any]:
    return {
        "kind": "measure", "measure": "decode", "size": 512, "engine": engine, "mode": "",
        "version": "1", "unit": "tokens/s", "rounds": [value] * 3, "median": value,
        "model": "m.gguf", "model_bytes": 5_000_000, "model_sha256": "0" * 16, "threads": 2,
        "cpu": "a CPU", "cpu_flags": ["avx2"], "commit": "abc", "date": "2026-01-01T00:00:00",
        "new_tokens": 48,
        "limits": {"read_bytes_per_second": 4e10, "int8_operations_per_second": 2e12},
    } | others  # fmt: skip


LINES = [
    line("hfcore", 1234.0, share={"median": 0.5, "least": 0.456, "most": 0.52}, limit=2468.0),
    line("llama-cpp-python", 300.0, mode="plain", ratio={"median": 4.1, "least": 4, "most": 4.2}),
    line("llama-cpp-python", 600.0, mode="flash", ratio={"median": 2.1, "least": 2, "most": 2.2}),
    line("mistralrs", 0, kind="absent", mode=None, measure=None, reason="not here"),
]


def test_the_table_takes_a_rivals_best_mode_and_names_who_is_missing() -> None:
    text = report.table(LINES)
    assert "## m.gguf (5 MB)" in text
    assert "|  | hfcore | of the limit | llama-cpp-python |" in text
    assert (
        "| decode at depth 512 | 1,234 tok/s | 50% (46-52) | 600 tok/s, 2.10x (2.00-2.20) |" in text
    )
    assert "- mistralrs: not here" in text
    assert "40.0 GB/s" in text
    assert "commit abc" in text


def test_what_the_limits_moved_between_is_said() -> None:
    read, multiply = "read_bytes_per_second", "int8_operations_per_second"
    text = report.table([
        line("hfcore", 1.0, limit_rounds={read: [4.31e10, 7.84e10]}),
        line("hfcore", 1.0, size=0, limit_rounds={read: [5e10]}),
        line("hfcore", 1.0, measure="prefill", limit_rounds={multiply: [1.851e12, 1.849e12]}),
    ])  # fmt: skip
    assert "which read 43.1-78.4 GB/s and do 1.85 int8 TOPS; hfcore 1;" in text


def test_the_share_of_a_run_that_had_one_limit_for_all_rounds_has_no_spread() -> None:
    text = report.table([line("hfcore", 1234.0, share=0.5)])
    assert "| decode at depth 512 | 1,234 tok/s | 50% |" in text


def test_accuracy_is_one_table_with_a_row_for_each_model() -> None:
    def nll(model: str, text: str | None, ours: float, theirs: float | None) -> dict[str, Any]:
        found = {"hfcore": ours} | ({} if theirs is None else {"llama-cpp-python": theirs})
        difference = None if theirs is None else ours / theirs - 1
        return line("", 0, kind="nll", text=text, nll=found, difference=difference,
                    model=model, reason="not here", versions={"hfcore": "1"})  # fmt: skip

    accuracy = [
        nll("m.gguf", "a", 2.02, 2.0), nll("m.gguf", "b", 3.96, 4.0), nll("m.gguf", None, 2.99, 3),
        nll("other.gguf", "a", 5.0, None), nll("other.gguf", None, 5.0, None),
    ]  # fmt: skip
    text = report.table([*LINES, *accuracy])
    table = text.partition("## Accuracy\n\n")[2]
    assert "| m.gguf | 2.9900 | 3.0000 | -0.33% | -1.00% to +1.00% |" in table
    assert "| other.gguf | 5.0000 | not here | - | - |" in table
    assert table.endswith("a CPU; hfcore 1; commit abc; 2026-01-01.\n")
    assert "Accuracy" not in report.table(LINES)
    assert text.partition("## Accuracy")[0].rstrip() == report.table(LINES).rstrip()


def test_a_run_held_to_an_instruction_set_has_a_table_of_its_own() -> None:
    held = line("hfcore", 99.0, isa="avx2", instruction_set="avx2")
    text = report.table([*LINES, held])
    assert "## m.gguf (5 MB)\n" in text
    table = text.partition("## m.gguf, avx2 alone (5 MB)\n")[2]
    assert "| decode at depth 512 | 99 tok/s |" in table
    assert "hfcore 1 (avx2);" in table


def test_a_model_that_nobody_could_run_has_no_table_but_the_reasons() -> None:
    text = report.table(LINES[-1:])
    assert "|" not in text
    assert text.endswith("## m.gguf (5 MB)\n\nNot measured:\n\n- mistralrs: not here\n")


def test_tensor_types_are_one_table_with_a_row_each() -> None:
    of = [
        line(engine, value, measure=measure, size=size, tensor_type=kind, shape="1b",
             model=f"1b-{kind}.gguf", model_sha256=kind, **others)
        for kind in ("Q4_0", "Q8_0")
        for measure, size in (("prefill", 512), ("decode", 0))
        for engine, value, others in (
            ("hfcore", 200.0, {"share": 0.5}),
            ("llama-cpp-python", 100.0, {"ratio": {"median": 2.0, "least": 1.9, "most": 2.1}}),
        )
    ]  # fmt: skip
    missing = of[-1] | {"kind": "absent", "measure": "prompt of 512", "reason": "out of luck"}
    text = report.table([*LINES, *of[:-1], missing])
    assert "## m.gguf (5 MB)" in text
    assert "1b-Q4_0.gguf" not in text
    table = text.partition("## Tensor types: random weights of shape 1b\n\n")[2]
    rival = "100 tok/s, 2.00x (1.90-2.10)"
    assert table.splitlines()[:4] == [
        "| type | decode at depth 0 | of the limit | llama-cpp-python "
        "| prefill, 512 tokens | of the limit | llama-cpp-python |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| Q4_0 | 200 tok/s | 50% | {rival} | 200 tok/s | 50% | {rival} |",
        f"| Q8_0 | 200 tok/s | 50% | - | 200 tok/s | 50% | {rival} |",
    ]
    assert "- Q8_0: llama-cpp-python, prompt of 512: out of luck" in table
    assert "sha256" not in table


def test_a_picture_without_a_model_to_draw_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    with pytest.raises(InvalidRequestError, match="to draw, got none"):
        report.picture([line("hfcore", 1.0, tensor_type="Q4_0")], tmp_path / "never.png")


def test_a_report_is_made_from_files_alone(results: Path, tmp_path: Path) -> None:
    table = tmp_path / "docs" / "bench.md"
    assert bench("--report", results, "--table", table) == 0
    assert table.read_text(encoding="utf-8") == results.with_suffix(".md").read_text("utf-8")
    assert "| prefill, 24 tokens |" in table.read_text(encoding="utf-8")


def test_a_file_that_is_no_result_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"kind": "limits"}\n[1]\n', encoding="utf-8")
    assert bench("--report", other) == 2
    assert "other.jsonl, line 2: wanted a line of results, got [1]" in capsys.readouterr().err


def test_a_picture_is_made_from_the_lines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = tmp_path / "docs" / "bench.png"
    more = [line("hfcore", 5.0, measure="prefill", size=128, limit=9.0), line("x", 3.0, size=0)]
    report.picture([*LINES, *more], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_picture_is_refused_before_anything_is_measured(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HfcoreError, match=r"pip install 'hfcore\[bench\]'"):
        report.picture(LINES, Path("never.png"))
    assert bench(tiny, "--picture", "never.png") == 1
    assert "needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rivals", "llama-cpp"], "did you mean 'llama-cpp-python'?"),
        (["--rival-python", "/no/such/python"], "--rival-python: python does not run as a Python"),
        (["--report", "x.jsonl"], "--report takes no models"),
    ],
)
def test_a_wrong_command_line_is_said(
    tiny: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tiny, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument", ["--rounds=0", "--prefill=0", "--batch=1,x", "--depth=-1", "--isa=mmx"]
)
def test_a_number_out_of_range_is_refused(argument: str) -> None:
    with pytest.raises(SystemExit) as caught:
        bench(argument)
    assert caught.value.code == 2
    with pytest.raises(InvalidRequestError):
        report.read([])
