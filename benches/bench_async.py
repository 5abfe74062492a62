"""A thousand streams on one event loop: that all end, how long the loop is held up, what it costs.

    python benches/bench_async.py [--streams 1000] [--tokens 16] [--rounds 5] [--uvloop]

On a tiny model of noise, so that deltas come as fast as they can. A task that sleeps for 1 ms, over
and over, says how late the loop is by the clock (`lag`), and how much CPU time the loop's thread
took meanwhile (`held`), to which other programs on the machine add nothing.

Runs, in turn, in each round:
bare: as many tasks, each woken as often, without hfcore, while two threads keep the CPUs busy;
queued: as many `astream`s at once, of which the engine runs 32 at a time;
together: the same, and the engine runs all at a time.

Figures and all that is needed to judge them go to benches/results/async.json.
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hfcore import Engine, __version__
from hfcore.testing import tiny_model

HERE = Path(__file__).resolve().parent
BAR_MS = 20.0

Load = Callable[[argparse.Namespace], Awaitable[int]]
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

    async def task() -> int:
        for _ in range(args.tokens):
            waiting.append(loop.create_future())
            await waiting[-1]
        return args.tokens

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    wake()
    try:
        return sum(await asyncio.gather(*(task() for _ in range(args.streams))))
    finally:
        ended.set()


def streams_of(engine: Engine) -> Load:
    async def one(n: int, args: argparse.Namespace) -> int:
        deltas, tokens = 0, 0
        prompt = f"Hello, this is stream {n}."
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


async def watched(load: Load, args: argparse.Namespace) -> dict[str, float]:
    """One run of a load, with what the ticker saw, in milliseconds."""
    lags: list[float] = []
    held: list[float] = []

    async def tick() -> None:
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.001)
            lags.append(1e3 * (time.perf_counter() - wall) - 1)
            held.append(1e3 * (time.thread_time() - cpu))

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    lags.clear(), held.clear()
    wall, cpu = time.perf_counter(), time.thread_time()
    wakes = await load(args)
    seconds, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    ticker.cancel()
    with suppress(asyncio.CancelledError):
        await ticker
    return {
        "seconds": round(seconds, 3),
        "ticks": len(lags),
        "lag_max_ms": round(max(lags), 2),
        "lag_p99_ms": round(statistics.quantiles(lags, n=100)[98], 2),
        "held_max_ms": round(max(held), 2),
        "wakes": wakes,
        "loop_cpu_s": round(cpu, 3),
        "loop_cpu_us_per_wake": round(1e6 * cpu / wakes, 1),
    }


def rounds(args: argparse.Namespace, path: Path) -> dict[str, list[dict[str, float]]]:
    import uvloop

    run: Callable[[Any], dict[str, float]] = uvloop.run if args.uvloop else asyncio.run
    runs: dict[str, list[dict[str, float]]] = {"bare": [], "queued": [], "together": []}
    with (
        Engine(path, threads=args.threads) as queued,
        Engine(path, threads=args.threads, max_sequences=args.streams) as together,
    ):
        loads = {"bare": bare, "queued": streams_of(queued), "together": streams_of(together)}
        few = argparse.Namespace(**{**vars(args), "streams": 8})
        for load in loads.values():
            run(load(few))
        for n in range(args.rounds):
            for name, load in loads.items():
                seen = run(watched(load, args))
                runs[name].append(seen)
                print(f"{n + 1} {name:9}", *(f"{k} {v}" for k, v in seen.items()), flush=True)
    return runs


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """The worst of each run's longest lag and its median; the median of the rest."""
    longest = ("lag_max_ms", "held_max_ms")
    worst = {f"worst_{name}": max(run[name] for run in runs) for name in longest}
    return worst | {name: statistics.median(run[name] for run in runs) for name in runs[0]}


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
    parser.add_argument("--uvloop", action="store_true", help="instead of asyncio's own loop")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "async.json")
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        runs = rounds(args, tiny_model(folder))
    found = {name: summary(of_one) for name, of_one in runs.items()}
    for name in ("queued", "together"):
        lag, held = found[name]["lag_max_ms"], found[name]["worst_held_max_ms"]
        met = lag <= BAR_MS
        print(
            f"{name}: bar {'met' if met else 'NOT met'}: longest lag of a run {lag} ms (median; bar"
            f" {BAR_MS:g} ms; bare {found['bare']['lag_max_ms']} ms), loop held {held} ms at most,"
            f" {found[name]['loop_cpu_us_per_wake']} us of its CPU for a delta"
        )
    options = {name: value for name, value in vars(args).items() if name != "out"}
    result = {"bar_ms": BAR_MS, "options": options, "machine": before}
    result |= {"summary": found, "runs": runs}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
