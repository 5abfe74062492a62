"""Minutes of mixed load: nothing fails but what should, memory stays flat, pages come back."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcore import Engine
from hfcore import options as options_module
from hfcore.engine import Prompt
from hfcore.errors import (
    ContextOverflowError,
    InvalidRequestError,
    RequestTimeoutError,
    UnknownOptionError,
)

from .measure import Line, opened, text_of_repo

CONTEXT = 1024
CACHE = 48 << 20  # bytes: of a demo model about 2,000 tokens, so that requests evict each other
CLIENTS = 6  # that block, and as many in an event loop
FLAT = 0.03
Messages = list[dict[str, str]]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
}


@dataclass(frozen=True)
class Job:
    """A request; `wanted` is the error it must end with, `leaves` and `pause` are its reader's."""

    kind: str
    prompt: Prompt
    wishes: dict[str, Any]
    wanted: type[Exception] | None = None
    leaves: int | None = None
    pause: float = 0.0


def soak(model: Path, options: Namespace) -> Line:
    """Clients in threads and in an event loop, each with requests drawn from its own seed."""
    end = time.monotonic() + 60 * options.minutes
    found: Counter[str] = Counter()
    opening = {"context_size": CONTEXT, "kv_cache_bytes": CACHE, "max_sequences": 8}
    with (
        opened(model, options, **opening) as engine,
        ThreadPoolExecutor(CLIENTS + 1) as pool,
    ):
        clients = [pool.submit(block, engine, seed, end) for seed in range(CLIENTS)]
        clients.append(pool.submit(lambda: asyncio.run(loop(engine, end))))
        samples = watch(engine, lambda: not all(client.done() for client in clients))
        for client in clients:
            found += client.result()
        left = emptied(engine)
    wrong = {what: count for what, count in found.items() if what.startswith("WRONG")}
    late = samples[len(samples) // 3 :]
    memory = [sample["resident"] for sample in late] or [0]
    # Also of medians: a moment's buffer is no growth.
    tenth = max(1, len(memory) // 10)
    grown = statistics.median(memory[-tenth:]) / max(1, statistics.median(memory[:tenth])) - 1
    flat = max(memory) / max(1, min(memory)) - 1
    line = {
        "minutes": options.minutes, "requests": sum(found.values()), "outcomes": dict(found),
        "wrong": wrong, "left": left, "resident": [min(memory), max(memory)],
        "resident_spread": round(flat, 4), "resident_growth": round(grown, 4),
        "process_threads": [min(s["threads"] for s in late), max(s["threads"] for s in late)],
        "metrics": samples[-1]["metrics"],
    }  # fmt: skip
    said = (
        f"{sum(found.values())} requests in {options.minutes:g} min, {sum(wrong.values())} wrong"
        f" {wrong or ''}; memory {min(memory) >> 20}-{max(memory) >> 20} MB, spread {flat:.1%},"
        f" growth {grown:+.1%}, bar {FLAT:.0%}; left: {left or 'nothing'}"
    )
    met = not wrong and not left and flat <= FLAT
    return line | {"bar": {"resident_spread": FLAT}, "met": met, "said": said}


# The load -----------------------------------------------------------------------------------------


def job(drawn: random.Random) -> Job:
    """A request of one of many kinds."""
    prompt: Messages = [
        {"role": "system", "content": text_of_repo(drawn.randrange(3), 120)},
        {"role": "user", "content": text_of_repo(drawn.randrange(10**6), drawn.randint(3, 60))},
    ]
    # Whoever hangs is told of, too.
    wishes: dict[str, Any] = {"max_tokens": drawn.randint(1, 48), "timeout": 300}
    if "priority" in options_module.REQUEST:
        wishes["priority"] = drawn.randint(-1, 1)
    if drawn.random() < 0.5:
        wishes |= {"temperature": 0.8, "seed": drawn.randrange(10**6)}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    kinds: tuple[tuple[int, Callable[[], Job]], ...] = (
        (6, lambda: Job("plain", prompt, wishes)),
        (3, lambda: Job("chat", longer(prompt, drawn), wishes)),
        (3, lambda: Job("left", prompt, wishes, leaves=drawn.randint(0, 10))),
        (1, lambda: Job("slow reader", prompt, wishes, pause=0.05)),
        (2, lambda: Job("schema", prompt, wishes | {"max_tokens": 64, "response_format": form})),
        (1, lambda: Job("several", prompt, wishes | {"n": 3})),
        (1, lambda: Job("logprobs", prompt, wishes | {"logprobs": True, "prompt_logprobs": True})),
        (1, lambda: Job("timeout", prompt, {"max_tokens": 900, "ignore_eos": True,
                                            "timeout": 0.02}, RequestTimeoutError)),
        (1, lambda: bad(drawn, prompt)),
    )  # fmt: skip
    return drawn.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]()


def longer(prompt: Messages, drawn: random.Random) -> Messages:
    """The chat with turns before, which others have too."""
    topic = drawn.randrange(4)
    turns = [
        {"role": role, "content": text_of_repo(100 * topic + turn, 25)}
        for turn in range(drawn.randint(1, 3))
        for role in ("user", "assistant")
    ]
    return [prompt[0], *turns, prompt[1]]


def bad(drawn: random.Random, prompt: Messages) -> Job:
    """A request that must be refused."""
    wanted: tuple[tuple[Prompt, dict[str, Any], type[Exception]], ...] = (
        (prompt, {"temprature": 1}, UnknownOptionError),
        (prompt, {"temperature": -1}, InvalidRequestError),
        (prompt, {"regex": "(["}, InvalidRequestError),
        (prompt, {"n": 99}, InvalidRequestError),
        ([10**9], {}, InvalidRequestError),
        ([], {}, InvalidRequestError),
        ("word " * (2 * CONTEXT), {}, ContextOverflowError),
    )
    return Job("bad", *drawn.choice(wanted))


def judged(task: Job, error: Exception | None) -> str:
    """What became of it; "WRONG ..." where that should not be."""
    if error is None:
        return task.kind if task.wanted is None else f"WRONG {task.kind}: no {task.wanted.__name__}"
    if task.wanted is not None and isinstance(error, task.wanted):
        return f"{task.kind}: {task.wanted.__name__}"
    return f"WRONG {task.kind}: {type(error).__name__}: {error!s:.200}"


def block(engine: Engine, seed: int, end: float) -> Counter[str]:
    """A client in a thread."""
    drawn, found = random.Random(seed), Counter[str]()  # noqa: S311  # not for secrets
    while time.monotonic() < end:
        task = job(drawn)
        error: Exception | None = None
        try:
            with engine.stream(task.prompt, **task.wishes) as stream:
                for count, _ in enumerate(stream, 1):
                    time.sleep(task.pause)
                    if task.leaves is not None and count >= task.leaves:
                        break
        except Exception as raised:  # what should not come is told too
            error = raised
        found[judged(task, error)] += 1
    return found


async def loop(engine: Engine, end: float) -> Counter[str]:
    """Clients in an event loop."""

    async def client(seed: int) -> Counter[str]:
        drawn, found = random.Random(seed), Counter[str]()  # noqa: S311  # not for secrets
        while time.monotonic() < end:
            task = job(drawn)
            error: Exception | None = None
            stream = engine.astream(task.prompt, **task.wishes)
            count = 0
            try:
                async for _ in stream:
                    count += 1
                    await asyncio.sleep(task.pause)
                    if task.leaves is not None and count >= task.leaves:
                        break
            except Exception as raised:  # as in `block`
                error = raised
            finally:
                await stream.aclose()
            found[judged(task, error)] += 1
        return found

    found = Counter[str]()
    for one in await asyncio.gather(*(client(1000 + seed) for seed in range(CLIENTS))):
        found += one
    return found


# What is held -------------------------------------------------------------------------------------


def watch(engine: Engine, runs: Callable[[], bool]) -> list[dict[str, Any]]:
    """The process and the engine, twice a second, as long as the load runs."""
    samples = []
    while runs():
        statm = Path("/proc/self/statm").read_text(encoding="utf-8").split()
        samples.append({
            "resident": int(statm[1]) * os.sysconf("SC_PAGE_SIZE"),
            "threads": threading.active_count(), "metrics": engine.metrics(),
        })  # fmt: skip
        time.sleep(0.5)
    return samples


def emptied(engine: Engine) -> dict[str, float]:
    """What is still held some seconds after the last request; nothing is as it should be."""
    deadline = time.monotonic() + 10
    while True:
        now = engine.metrics()
        left = {
            name: now[name] for name in ("running", "waiting", "pages_used") if now[name]
        }  # fmt: skip
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)
