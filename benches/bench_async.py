"""A thousand streams on one event loop: that all end, how long the loop is held up, what it costs.

    python benches/bench_async.py [--streams 1000] [--tokens 16] [--rounds 5] [--letters 24]

On a tiny model of noise, so that deltas come as fast as they can. A task that sleeps for 1 ms, over
and over, says how late the loop is by the clock (`lag`), and how much CPU time the loop's thread
took meanwhile (`held`): to that other programs on the machine add nothing, and Python's garbage
collections are not counted (`gc` is the longest; its length is that of the whole program).

Runs, in turn, in each round, on asyncio's own loop and on uvloop:
bare: as many tasks, each woken as often, without hfcore, while two threads keep the CPUs busy;
queued: as many `astream`s at once, of which the engine runs 32 at a time;
together: the same, and the engine runs all at a time.

Figures and all that is needed to judge them go to benches/results/async.json.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hfcore import Engine, __version__
from hfcore.testing import tiny_model

HERE = Path(__file__).resolve().parent
BAR_MS = 20.0

Load = Callable[[argparse.Namespace], Coroutine[Any, Any, int]]
"""What runs on the loop; gives how many times it woke its tasks."""


# --- the runs -------------------------------------------------------------------------------------


async def bare(args: argparse.Namespace) -> int:
    """What asyncio and the machine cost by themselves."""
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[None]] = []
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)  # without the GIL

    def wake() -> None:
        for future in waiting[:32]:
            future.set_result(None)
        del waiting[:32]
        if not ended.is_set():
            loop.call_later(0.001, wake)

    async def task() -> None:
        for _ in range(args.tokens):
            waiting.append(loop.create_future())
            await waiting[-1]

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    wake()
    try:
        await asyncio.gather(*(task() for _ in range(args.streams)))
    finally:
        ended.set()
    return int(args.streams * args.tokens)


def streams_of(engine: Engine) -> Load:
    async def one(n: int, args: argparse.Namespace) -> int:
        deltas, tokens = 0, 0
        prompt = f"Hello, this is stream {n}.".ljust(args.letters, "?")
        async for delta in engine.astream(prompt, max_tokens=args.tokens, ignore_eos=True):
            deltas += 1
            tokens += len(delta.token_ids)
            reason = delta.finish_reason
        assert (tokens, reason) == (args.tokens, "length")
        return deltas

    async def load(args: argparse.Namespace) -> int:
        return sum(await asyncio.gather(*(one(n, args) for n in range(args.streams))))

    return load


# --- measuring ------------------------------------------------------------------------------------


class Collections:
    """How long Python's garbage collections took, in milliseconds of the thread's CPU time."""

    def __init__(self) -> None:
        self.begun = self.took = self.longest = 0.0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        now = 1e3 * time.thread_time()
        if phase == "start":
            self.begun = now
        else:
            self.took += now - self.begun
            self.longest = max(self.longest, now - self.begun)


async def watched(load: Load, args: argparse.Namespace) -> dict[str, float]:
    """One run of a load, with what the ticker saw, in milliseconds."""
    lags: list[float] = []
    held: list[float] = []
    collections = Collections()

    async def tick() -> None:
        while True:
            wall, cpu = time.perf_counter(), 1e3 * time.thread_time() - collections.took
            await asyncio.sleep(0.001)
            lags.append(1e3 * (time.perf_counter() - wall) - 1)
            held.append(1e3 * time.thread_time() - collections.took - cpu)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    lags.clear()
    held.clear()
    gc.callbacks.append(collections)
    wall, cpu = time.perf_counter(), time.thread_time()
    wakes = await load(args)
    seconds, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    gc.callbacks.remove(collections)
    ticker.cancel()
    with suppress(asyncio.CancelledError):
        await ticker
    return {
        "seconds": round(seconds, 3),
        "ticks": len(lags),
        "lag_max_ms": round(max(lags), 2),
        "lag_p99_ms": round(statistics.quantiles(lags, n=100)[98], 2),
        "held_max_ms": round(max(held), 2),
        "gc_max_ms": round(collections.longest, 2),
        "wakes": wakes,
        "loop_cpu_s": round(cpu, 3),
        "loop_cpu_us_per_wake": round(1e6 * cpu / wakes, 1),
    }


def event_loops() -> dict[str, Callable[[Any], Any]]:
    """How each kind of loop runs a coroutine."""
    try:
        import uvloop
    except ImportError:
        return {"asyncio": asyncio.run}
    return {"asyncio": asyncio.run, "uvloop": uvloop.run}


def rounds(args: argparse.Namespace, path: Path) -> dict[str, list[dict[str, float]]]:
    """The runs of each load on each loop, by "loop load"."""
    runs: dict[str, list[dict[str, float]]] = {}
    with (
        Engine(path, threads=args.threads) as queued,
        Engine(path, threads=args.threads, max_sequences=args.streams) as together,
    ):
        loads = {"bare": bare, "queued": streams_of(queued), "together": streams_of(together)}
        few = argparse.Namespace(**{**vars(args), "streams": 8})
        for load in loads.values():
            asyncio.run(load(few))
        for n in range(args.rounds):
            for loop, run in event_loops().items():
                for name, load in loads.items():
                    seen = run(watched(load, args))
                    runs.setdefault(f"{loop} {name}", []).append(seen)
                    said = (f"{key} {value}" for key, value in seen.items())
                    print(n + 1, loop, name, *said, flush=True)
    return runs


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of the runs, and the worst of their longest lags."""
    longest = ("lag_max_ms", "held_max_ms", "gc_max_ms")
    worst = {f"worst_{name}": max(run[name] for run in runs) for name in longest}
    return worst | {
        name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]
    }


def machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    ask = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(ask, cwd=HERE, capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "hfcore": __version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of each engine")
    parser.add_argument("--letters", type=int, default=24, help="of each prompt, at least")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "async.json")
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        runs = rounds(args, tiny_model(folder))
    found = {name: summary(of_one) for name, of_one in runs.items()}
    for name, of_runs in found.items():
        bare = found[f"{name.split()[0]} bare"]["lag_max_ms"]
        if name.endswith("bare"):
            continue
        lag, held = of_runs["lag_max_ms"], of_runs["worst_held_max_ms"]
        of_runs["bar_met"] = max(lag, held) <= BAR_MS
        met = "met" if of_runs["bar_met"] else "NOT met"
        print(
            f"{name}: bar {met}: longest lag {lag} ms, median of the runs (bar {BAR_MS:g} ms; bare"
            f" {bare} ms); held by its own thread for {held} ms at most, and for"
            f" {of_runs['worst_gc_max_ms']} ms by garbage collection;"
            f" {of_runs['loop_cpu_us_per_wake']} us of the loop's CPU for a delta"
        )
    options = {name: value for name, value in vars(args).items() if name != "out"}
    result = {"bar_ms": BAR_MS, "options": options, "machine": before}
    result |= {"summary": found, "runs": runs}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
