"""64 requests at once with one system prompt of 1,000 tokens: run once, held once?"""

from __future__ import annotations

import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfcore import Engine

from .measure import GREEDY, LackingError, Line, ids, metric, opened, shown, spread, together

REQUESTS, SYSTEM, QUESTION, NEW = 64, 1000, 24, 16
PAGE = 16  # positions
ROUNDS = 2  # without the cache one takes minutes on a model of 1B


def common(model: Path, options: Namespace) -> Line:
    """Prompt tokens that were run, cache pages at most, and the time beside that without a cache.

    Ids, each system prompt once: what is found was put there by the same round.
    """
    rounds = [one_round(model, options, seed) for seed in range(min(options.rounds, ROUNDS))]
    line: Line = {"requests": REQUESTS, "common": SYSTEM, "own": QUESTION, "new": NEW}
    for name in rounds[0]:
        line[name] = [found[name] for found in rounds]
    # A page that is begun in the common part is everyone's own.
    most_run = SYSTEM + REQUESTS * (QUESTION + PAGE)
    most_pages = -(-SYSTEM // PAGE) + REQUESTS * (1 + -(-(QUESTION + NEW) // PAGE))
    met = max(line["tokens_run"]) <= most_run and max(line["pages"]) <= most_pages
    ratios = [a / b for a, b in zip(line["seconds"], line["seconds_without"], strict=True)]
    said = (
        f"{max(line['tokens_run']):.0f} prompt tokens run of {REQUESTS * (SYSTEM + QUESTION)}, bar"
        f" {most_run}; {max(line['pages']):.0f} pages, bar {most_pages}, without the cache"
        f" {max(line['pages_without']):.0f}; time {shown(ratios)} x that without"
    )
    bar = {"tokens_run": most_run, "pages": most_pages}
    return line | {"time_over_without": spread(ratios), "bar": bar, "met": met, "said": said}


def one_round(model: Path, options: Namespace, seed: int) -> dict[str, float]:
    """All of them with the cache and without, on engines that have seen nothing of it."""
    found: dict[str, float] = {}
    for suffix, on in (("", True), ("_without", False)):
        opening = {"context_size": 2048, "max_sequences": REQUESTS, "prefix_cache": on}
        with opened(model, options, **opening) as engine:
            vocabulary = engine.info["vocab_size"]
            together(engine, [ids(8, seed, vocabulary)], **GREEDY, max_tokens=4)
            system = ids(SYSTEM, 1000 * seed + 999, vocabulary)
            prompts = [system + ids(QUESTION, 1000 * seed + i, vocabulary) for i in range(REQUESTS)]
            before = metric(engine, "prompt_tokens", "prefix_hit_tokens")
            start = time.perf_counter()
            with watched(engine) as peak:
                together(engine, prompts, **GREEDY, max_tokens=NEW)
            found[f"seconds{suffix}"] = round(time.perf_counter() - start, 3)
            asked, hit = metric(engine, "prompt_tokens", "prefix_hit_tokens")
            found[f"tokens_run{suffix}"] = asked - before[0] - (hit - before[1])
            found[f"pages{suffix}"] = max(peak)
            [found[f"preemptions{suffix}"]] = metric(engine, "preemptions")
    return found


@contextmanager
def watched(engine: Engine) -> Iterator[list[float]]:
    """The pages in use at each moment of the block. Raises LackingError at its end for none."""
    seen: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            now = engine.metrics()
            seen.append(now["pages_used"] + now.get("pages_cached", 0))

    metric(engine, "pages_used", "pages_cached")
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
    if not seen:
        raise LackingError("the requests were over before their pages were counted")
