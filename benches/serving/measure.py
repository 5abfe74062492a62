"""What the scenarios share: an engine, runs of requests, figures. Nothing here knows a scenario."""

from __future__ import annotations

import functools
import random
import statistics
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfcore import Delta, Engine, Usage
from hfcore.engine import Prompt
from hfcore.errors import UnknownOptionError

Line = dict[str, Any]
"""What a scenario found: figures, `bar` and `met`."""
Scenario = Callable[[Path, Namespace], Line]

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
REPO = Path(__file__).resolve().parents[2]


class LackingError(Exception):
    """The engine, the machine or a rival lacks what a scenario needs; the message says what."""


@contextmanager
def opened(model: Path, options: Namespace, **opening: Any) -> Iterator[Engine]:
    """An engine of the bench's threads. Raises LackingError where it does not know an option."""
    try:
        engine = Engine(model, threads=options.threads, **opening)
    except UnknownOptionError as error:
        raise LackingError(f"the engine has no option {error.name}") from error
    with engine:
        yield engine


@dataclass
class Run:
    """A request read by a thread of its own: when each token came, in seconds of perf_counter."""

    asked: float
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    usage: Usage | None = None

    @property
    def first(self) -> float:
        """Seconds from asking to the first token."""
        return self.times[0] - self.asked

    def take(self, delta: Delta) -> None:
        self.times += [time.perf_counter()] * len(delta.token_ids)
        self.ids += delta.token_ids
        self.usage = delta.usage or self.usage

    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) of each wait between tokens."""
        return list(zip(self.times, self.times[1:], strict=False))


def run(engine: Engine, prompt: Prompt, **wishes: Any) -> Run:
    """A request, from its submission to its end."""
    done = Run(time.perf_counter())
    for delta in engine.stream(prompt, **wishes):
        done.take(delta)
    return done


class Reader:
    """A request that a thread reads until it ends or is left."""

    def __init__(self, engine: Engine, prompt: Prompt, **wishes: Any) -> None:
        self.run = Run(time.perf_counter())
        self._stream = engine.stream(prompt, **wishes)
        self._left = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for delta in self._stream:
            self.run.take(delta)
            if self._left:
                return

    def wait(self, tokens: int) -> None:
        """Until so many tokens came. Raises LackingError when it ends before."""
        while len(self.run.times) < tokens:
            if not self._thread.is_alive():
                raise LackingError(f"a stream ended before its token {tokens}")
            time.sleep(0.002)

    def leave(self) -> Run:
        self._left = True
        self._thread.join()
        self._stream.close()
        return self.run


def together(engine: Engine, prompts: Sequence[Prompt], **wishes: Any) -> list[Usage]:
    """What all of them cost, submitted before the first is read."""
    streams = [engine.stream(prompt, **wishes) for prompt in prompts]
    return [usage for stream in streams if (usage := list(stream)[-1].usage)]


def ids(length: int, seed: int, vocabulary: int) -> list[int]:
    """Any tokens: the same for a seed, others for another; none of the special ones."""
    drawn = random.Random(seed)  # noqa: S311  # not for secrets
    return [drawn.randrange(min(1000, vocabulary // 2), vocabulary - 16) for _ in range(length)]


def metric(engine: Engine, *names: str) -> list[float]:
    """These counters. Raises LackingError for one that the engine does not have."""
    found = engine.metrics()
    for name in names:
        if name not in found:
            raise LackingError(f"the engine's metrics have no {name}")
    return [found[name] for name in names]


def spread(values: Sequence[float], digits: int = 3) -> list[float]:
    """[least, median, most]."""
    least_median_most = min(values), statistics.median(values), max(values)
    return [round(value, digits) for value in least_median_most]


def shown(values: Sequence[float]) -> str:
    """The median with its spread.

    >>> shown([1.0, 2.0, 4.0])
    '2.00 (1.00-4.00)'
    """
    least, median, most = spread(values)
    return f"{median:.2f} ({least:.2f}-{most:.2f})"


def text_of_repo(seed: int, words: int) -> str:
    """Consecutive words of the repository's own texts."""
    all_ = words_of_repo()
    start = random.Random(seed).randrange(len(all_))  # noqa: S311  # not for secrets
    return " ".join((all_ * (2 + words // len(all_)))[start : start + words])


@functools.cache
def words_of_repo() -> list[str]:
    parts = [(REPO / name).read_text(encoding="utf-8") for name in ("DESIGN.md", "README.md")]
    return " ".join(parts).split()
