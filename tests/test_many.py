"""Requests that share an engine give what each gives alone, and leave nothing behind.

Clients are drawn from a seed: what they ask, how, when, and when they walk away; few cache pages
make the engine evict. As a program: `python tests/test_many.py 10` runs ten rounds of 300 requests
and prints each. HFCORE_MANY_ROUNDS is the number of rounds of the test.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfcore import Completion, Delta, Engine, _core, options
from hfcore.engine import Prompt, total
from hfcore.testing import tiny_model

REQUESTS = 300
THREADS = 10  # clients that block; as many more wait in an event loop
CONTEXT = 640
PAGES = {"f16": 4096, "int8": 2560}
"""Bytes of a page of the tiny model's cache, by its type."""
OPENING: dict[str, Any] = {"threads": 2, "context_size": CONTEXT, "max_sequences": 16}
WORDS = [
    "the", "a", "an", "on", "in", "at", "is", "or", "for", "to", "he", "she", "it", "ten", "ten",
    "one", "two", "red", "blue", "sea", "stone", "river", "rain", "house", "hat", "cat", "dog",
    "eats", "sees", "sings", "again", "again", "then", "there", "and", "and", "not", "1", "42",
]  # fmt: skip
STOPS = ["a", "th", "e", "qq", "an", "!", "\n", "on the"]
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
    {"type": "string", "maxLength": 12},
]


# What is asked ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A request, made after `pause` seconds; its client may leave after `leaves` deltas."""

    prompt: Prompt
    options: dict[str, Any]
    leaves: int | None
    pause: float


@dataclass
class Client:
    """Asks one thing after the other. In a chat each prompt has the answer before it."""

    random: random.Random
    system: str
    turns: int
    slow: bool
    history: list[dict[str, str]] = field(default_factory=list)

    def asks(self) -> Iterator[Ask]:
        """Its requests; `answered` is to be called between them."""
        self.history = [{"role": "system", "content": self.system}]
        for _ in range(self.turns):
            self.history.append({"role": "user", "content": text(self.random, 1, 8)})
            leaves = self.random.randint(0, 12) if self.random.random() < 0.15 else None
            pause = self.random.choice((0, 0, 0.001, 0.01))
            yield Ask(self.prompt(), wishes(self.random), leaves, pause)

    def prompt(self) -> Prompt:
        """Messages, or where there is one question a text or ids too, with the same beginning."""
        kind = self.random.randrange(3) if self.turns == 1 else 0
        plain = self.system + self.history[-1]["content"]
        return [list(self.history), plain, list(plain.encode())][kind]

    def answered(self, got: Completion) -> None:
        self.history.append({"role": "assistant", "content": got.text[:30]})


def text(random_: random.Random, least: int, most: int) -> str:
    return " ".join(random_.choices(WORDS, k=random_.randint(least, most)))


def wishes(random_: random.Random) -> dict[str, Any]:
    """The options of a request, so that its answer has one right text."""
    made: dict[str, Any] = {"max_tokens": random_.choice((1, 2, 8, 20, 40, 80)), "temperature": 0}
    if random_.random() < 0.35:
        made |= {"temperature": random_.choice((0.5, 1.0, 1.5)), "seed": random_.randrange(10**6)}
        made |= random_.choice(({}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}))
    some: dict[str, tuple[float, Any]] = {
        "n": (0.12, random_.randint(2, 3)),
        "stop": (0.25, random_.sample(STOPS, random_.randint(1, 2))),
        "ignore_eos": (0.5, True),
        "logprobs": (0.15, True),
        "prompt_logprobs": (0.04, True),
        "repetition_penalty": (0.1, 1.3),
        "response_format": (0.1, schema_format(random_.choice(SCHEMAS))),
        "speculation": (0.3, random_.random() < 0.5),
        "priority": (0.2, random_.randint(-2, 2)),
    }
    for name, (chance, value) in some.items():
        # Drawn whether it is known or not: what follows is the same in every version.
        if random_.random() < chance and name in options.REQUEST:
            made[name] = value
    if "response_format" in made:
        made |= {"max_tokens": 60}
        made.pop("stop", None)
        made.pop("ignore_eos", None)
    return made


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def clients(seed: int, requests: int) -> list[Client]:
    """So many requests, a third of them in chats; most begin with one of four long prompts."""
    drawn = random.Random(seed)  # noqa: S311  # not for secrets
    systems = [text(drawn, 20, 50) for _ in range(4)]
    made: list[Client] = []
    left = requests
    while left:
        turns = min(left, drawn.choice((1, 1, 1, 1, 1, 2, 4)))
        system = drawn.choice(systems) if drawn.random() < 0.8 else text(drawn, 1, 50)
        own = random.Random(drawn.random())  # noqa: S311  # not for secrets
        made.append(Client(own, system, turns, slow=drawn.random() < 0.05))
        left -= turns
    return made


# What comes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Got:
    """The deltas of a request up to its end, or to where its client left."""

    ask: Ask
    deltas: list[Delta]


def block(engine: Engine, client: Client) -> list[Got]:
    """A client in a thread."""
    found = []
    for ask in client.asks():
        time.sleep(ask.pause)
        deltas: list[Delta] = []
        with engine.stream(ask.prompt, **ask.options) as stream:
            while ask.leaves is None or len(deltas) < ask.leaves:
                delta = next(stream, None)
                if delta is None:
                    break
                deltas.append(delta)
                time.sleep(0.005 if client.slow else 0)
        found.append(Got(ask, deltas))
        client.answered(total(deltas))
    return found


async def wait(engine: Engine, client: Client, gate: asyncio.Semaphore) -> list[Got]:
    """A client in an event loop."""
    found = []
    async with gate:
        for ask in client.asks():
            await asyncio.sleep(ask.pause)
            deltas: list[Delta] = []
            stream = engine.astream(ask.prompt, **ask.options)
            async for delta in stream:
                if ask.leaves is not None and len(deltas) >= ask.leaves:
                    break
                deltas.append(delta)
                await asyncio.sleep(0.005 if client.slow else 0)
            await stream.aclose()
            found.append(Got(ask, deltas))
            client.answered(total(deltas))
    return found


def together(engine: Engine, all_: Sequence[Client]) -> list[Got]:
    """What all clients get, half of them in threads and half in an event loop."""

    async def loop() -> list[list[Got]]:
        gate = asyncio.Semaphore(THREADS)
        return await asyncio.gather(*(wait(engine, client, gate) for client in all_[1::2]))

    with ThreadPoolExecutor(THREADS) as pool:
        blocked = [pool.submit(block, engine, client) for client in all_[::2]]
        found = asyncio.run(loop())
        found += [future.result() for future in blocked]
    return [got for part in found for got in part]


def parted(deltas: Sequence[Delta], n: int) -> list[Completion]:
    """The completions of a request, by index."""
    return [total([delta for delta in deltas if delta.index == i]) for i in range(n)]


def differs(got: Got, alone: Sequence[Completion]) -> str | None:
    """How a request's completions differ from those alone, or None."""
    mine = parted(got.deltas, len(alone))
    for i, (here, there) in enumerate(zip(mine, alone, strict=True)):
        whole = here.finish_reason is not None
        length = None if whole else len(here.token_ids)
        if not whole and got.ask.leaves is None:
            return f"completion {i} has no end"
        if here.token_ids != there.token_ids[:length]:
            return f"completion {i}: tokens {here.token_ids}, alone {there.token_ids}"
        if here.logprobs is not None and here.logprobs != (there.logprobs or ())[:length]:
            return f"completion {i}: other log probabilities than alone"
        if here.prompt_logprobs not in (None, there.prompt_logprobs):
            return f"completion {i}: other log probabilities of the prompt than alone"
        if whole and (here.text, here.finish_reason) != (there.text, there.finish_reason):
            return f"completion {i}: {here!r}, alone {there!r}"
        if not there.text.startswith(here.text):
            return f"completion {i}: text {here.text!r}, alone {there.text!r}"
    return None


# Rounds -------------------------------------------------------------------------------------------


class Pair:
    """An engine with few pages, that all share; and one without cache or drafts, for one a time."""

    def __init__(self, model: Path, dtype: str, pages: int, draft: Path | None = None) -> None:
        opening = OPENING | {"kv_cache_dtype": dtype}
        size = pages * PAGES[dtype] * (2 if draft else 1)
        self.shared = Engine(model, **opening, kv_cache_bytes=size, draft_model=draft)
        self.alone = Engine(model, **opening, prefix_cache=False, speculation=False)

    def round(self, seed: int, requests: int) -> None:
        """So many requests together, then each alone. Raises AssertionError for a difference."""
        for got in together(self.shared, clients(seed, requests)):
            n = got.ask.options.get("n", 1)
            alone = parted(list(self.alone.stream(got.ask.prompt, **got.ask.options)), n)
            difference = differs(got, alone)
            assert difference is None, f"seed {seed}, {got.ask}: {difference}"
        self.is_empty()

    def is_empty(self) -> None:
        """Nobody runs, waits or holds a page, a moment after the last answer."""
        deadline = time.monotonic() + 5
        while True:
            now = self.shared.metrics()
            held = {name: now[name] for name in ("running", "waiting", "pages_used")}
            if not any(held.values()) or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        assert not any(held.values()), held

    def close(self) -> None:
        self.shared.close()
        self.alone.close()


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def threads() -> int:
    """All threads of this process, also those that Python does not know."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()


def rounds(model: Path, count: int, requests: int) -> Iterator[dict[str, Any]]:
    """Rounds with either type of cache and with a draft model in turn.

    After each, what the process and engine hold. A request may need 40 pages.
    """
    with ExitStack() as stack:
        drafts = tiny_model(stack.enter_context(tempfile.TemporaryDirectory()), seed=1)
        pairs = [Pair(model, "f16", 44), Pair(model, "int8", 56), Pair(model, "f16", 60, drafts)]
        for pair in pairs:
            stack.callback(pair.close)
        for seed in range(count):
            start = time.monotonic()
            pair = pairs[seed % len(pairs)]
            pair.round(seed, requests)
            gc.collect()
            yield {
                "seconds": round(time.monotonic() - start, 1), "threads": threads(),
                "resident": resident(), **pair.shared.metrics(),
            }  # fmt: skip


def check_growth(after: Sequence[dict[str, Any]]) -> None:
    """The later rounds leave as many threads as the first third, and no more than 1 MB a round."""
    early = after[: max(3, len(after) // 3)]  # all engines have run
    late = after[len(early) :]
    if late:
        assert max(r["threads"] for r in late) <= max(r["threads"] for r in early), after
        grown = late[-1]["resident"] - early[-1]["resident"]
        assert grown <= len(late) << 20, [r["resident"] for r in after]


def test_many_at_once_get_what_each_gets_alone_and_leave_nothing(tiny: Path) -> None:
    count = int(os.environ.get("HFCORE_MANY_ROUNDS", "6"))
    after = list(rounds(tiny, count, REQUESTS))
    for name in ("preemptions", "prefix_hit_tokens", "accepted_tokens"):
        assert all(r.get(name, 1) > 0 for r in after[-3:]), (name, after)  # each pair's last
    check_growth(after)


def test_the_same_seed_asks_the_same() -> None:
    def asked(seed: int) -> list[Ask]:
        return [ask for client in clients(seed, 100) for ask in client.asks()]

    first = asked(1)
    assert len(first) == 100
    assert first == asked(1) != asked(2)
    for option in ("n", "stop", "seed", "response_format", "logprobs"):
        assert any(option in ask.options for ask in first), option


def test_a_difference_is_seen() -> None:
    deltas = [Delta("a", (1,)), Delta("b", (2,), finish_reason="length")]
    ask = Ask("x", {}, None, 0)
    assert differs(Got(ask, deltas), parted(deltas, 1)) is None
    assert differs(Got(ask, deltas[:1]), parted(deltas, 1)) == "completion 0 has no end"
    other = [deltas[0], Delta("b", (3,), finish_reason="length")]
    assert "tokens (1, 2), alone (1, 3)" in (differs(Got(ask, deltas), parted(other, 1)) or "")
    left = Got(Ask("x", {}, 1, 0), deltas[:1])
    assert differs(left, parted(other, 1)) is None


def main(count: int) -> int:
    after = []
    with tempfile.TemporaryDirectory() as directory:
        for one in rounds(tiny_model(directory), count, REQUESTS):
            after.append(one)
            print(len(after), one, flush=True)
    check_growth(after)
    print(f"{count * REQUESTS} requests together as alone, hfcore {_core.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
