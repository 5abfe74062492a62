"""hfcore and llama.cpp on one file, in turn, in one run: tokens/s, and the ratio with its spread.

    python benches/bench_rivals.py [MODEL.gguf ...] [--rival-python PATH] [--threads 2]

Each engine lives in a process of its own, which idles while the other works. `--rival-python` names
a Python that can import llama_cpp; without it only hfcore is timed. Figures and all that is needed
to judge them go to benches/results/rivals.json. Absolute figures move with the machine: compare
within one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONTEXT = 2048

Timing = dict[str, float]
"""Seconds to the first token, seconds of the tokens after it, and how many those were."""
Run = Callable[[list[int], int], Timing]


# --- the two engines, each in its own process -----------------------------------------------------


def open_hfcore(model: str, threads: int) -> tuple[str, Run]:
    """Through the public API, as a user would."""
    import hfcore

    engine = hfcore.Engine(model, threads=threads, context_size=CONTEXT)

    def run(ids: list[int], new: int) -> Timing:
        start = time.perf_counter()
        arrivals: list[tuple[float, int]] = []
        for delta in engine.stream(ids, max_tokens=new, temperature=0, ignore_eos=True):
            arrivals.append((time.perf_counter(), len(delta.token_ids)))
        first = arrivals[0][0]
        later = sum(count for _, count in arrivals) - arrivals[0][1]
        return {"first": first - start, "rest": arrivals[-1][0] - first, "tokens": later}

    return f"hfcore {hfcore.__version__}", run


def open_llamacpp(model: str, threads: int) -> tuple[str, Run]:
    """llama-cpp-python's own loop without its sampler: greedy by numpy, flash attention on."""
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(
        model, n_ctx=CONTEXT, n_batch=512, n_threads=threads, n_threads_batch=threads,
        flash_attn=True, verbose=False,
    )  # fmt: skip

    def greedy() -> int:
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (llama.n_vocab(),))))

    def run(ids: list[int], new: int) -> Timing:
        llama.reset()
        start = time.perf_counter()
        llama.eval(ids)
        token = greedy()
        first = time.perf_counter()
        for _ in range(new - 1):
            llama.eval([token])
            token = greedy()
        return {"first": first - start, "rest": time.perf_counter() - first, "tokens": new - 1}

    return f"llama-cpp-python {llama_cpp.__version__}", run


ENGINES = {"hfcore": open_hfcore, "llamacpp": open_llamacpp}


def work(engine: str, model: str, threads: int) -> None:
    """A worker: its name as the first line, then one timing for each request line."""
    start = time.perf_counter()
    name, run = ENGINES[engine](model, threads)
    print(json.dumps({"name": name, "load": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["ids"], request["new"])), flush=True)


class Worker:
    """The other end of `work`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        hello = self._read()
        self.name: str = hello["name"]
        self.load: float = hello["load"]

    def run(self, ids: list[int], new: int) -> Timing:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
        self._process.stdin.flush()
        timing: Timing = self._read()
        return timing

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker ended with status {self._process.wait()}")
        return json.loads(line)


@contextmanager
def worker(python: str, engine: str, model: Path, threads: int) -> Iterator[Worker]:
    command = [python, __file__, str(model), "--worker", engine, "--threads", str(threads)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Worker(process)
        assert process.stdin is not None
        process.stdin.close()


# --- the comparison -------------------------------------------------------------------------------


def prompt_ids(tokens: int, round_: int) -> list[int]:
    """Ids without meaning; another round begins with others, so that no prefix cache helps."""
    return [1000 + (i * 7919 + round_ * 104_729) % 30_000 for i in range(tokens)]


def compare(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one model."""
    pythons = {"hfcore": sys.executable}
    if options.rival_python:
        pythons["llamacpp"] = options.rival_python
    with ExitStack() as stack:
        workers = {
            engine: stack.enter_context(worker(python, engine, model, options.threads))
            for engine, python in pythons.items()
        }
        timings: dict[str, list[Timing]] = {engine: [] for engine in workers}
        for round_ in range(options.rounds + 1):
            ids = prompt_ids(options.prompt, round_)
            # Alternate who goes first: a machine that warms up or slows down favours nobody.
            for engine in sorted(workers, reverse=bool(round_ % 2)):
                timing = workers[engine].run(ids, options.new)
                if round_ > 0:  # the first is the warm-up
                    timings[engine].append(timing)
        engines = {
            engine: {"name": w.name, "load_seconds": round(w.load, 3)}
            | rates(timings[engine], options)
            for engine, w in workers.items()
        }
    return {"model": model.name, "bytes": model.stat().st_size, "engines": engines} | ratios(
        engines
    )


def rates(timings: list[Timing], options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens/s of each round."""
    return {
        "prefill": [round(options.prompt / t["first"], 1) for t in timings],
        "decode": [round(t["tokens"] / t["rest"], 1) for t in timings],
    }


def ratios(engines: dict[str, Any]) -> dict[str, Any]:
    """hfcore's rate over the rival's, round by round: [least, median, most]."""
    if "llamacpp" not in engines:
        return {}
    found = {}
    for phase in ("prefill", "decode"):
        pairs = zip(engines["hfcore"][phase], engines["llamacpp"][phase], strict=True)
        each = sorted(ours / theirs for ours, theirs in pairs)
        found[phase] = [round(x, 3) for x in (each[0], statistics.median(each), each[-1])]
    return {"ratio": found}


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """What one must know to judge the figures."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = dict(
        line.split("\t: ", 1)
        for line in (cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "").splitlines()
        if "\t: " in line
    )
    fields = {key.strip(): value for key, value in fields.items()}
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    load = Path("/proc/loadavg")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "changed_files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "cpu": fields.get("model name", platform.processor()),
        "cpu_flags": [flag for flag in wanted if flag in fields.get("flags", "").split()],
        "load_average": load.read_text(encoding="utf-8").split()[0] if load.exists() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        # Names only: where this machine keeps its files is nobody's business.
        "command": " ".join(["python", "benches/bench_rivals.py", *map(base_name, sys.argv[1:])]),
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "rounds": options.rounds,
    }


def base_name(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
    return run.stdout.rstrip() if run.returncode == 0 else ""


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}  ({result['bytes'] / 1e6:.0f} MB)")
    for engine in result["engines"].values():
        row = "  ".join(
            f"{phase} {statistics.median(engine[phase]):8.1f} "
            f"({min(engine[phase]):.1f}-{max(engine[phase]):.1f}) tok/s"
            for phase in ("prefill", "decode")
        )
        print(f"  {engine['name']:28} {row}  load {engine['load_seconds']:.2f} s")
    for phase, (least, median, most) in result.get("ratio", {}).items():
        print(f"  hfcore / llama.cpp, {phase}: {median:.2f} ({least:.2f}-{most:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description="hfcore and llama.cpp in turn on the same file.")
    parser.add_argument(
        "models", nargs="*", type=Path, help="GGUF files (default: the demo models)"
    )
    parser.add_argument("--rival-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens (default: 512)")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="after the warm-up (default: 5)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "rivals.json")
    parser.add_argument("--worker", choices=list(ENGINES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, str(options.models[0]), options.threads)
        return
    results = []
    for model in options.models or demo_models():
        results.append(compare(model, options))
        show(results[-1])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"circumstances": circumstances(options), "results": results}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {options.out}")


def demo_models() -> list[Path]:
    from hfcore import fetch

    return [path for path in map(fetch.path_of, fetch.DEMO_MODELS) if path.is_file()]


if __name__ == "__main__":
    main()
