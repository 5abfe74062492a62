"""One model, hfcore and its rivals in turn: what is measured, in which order, and the lines of it.

Engines take turns within a round, and a round's figures are compared with each other alone: the
machine's limits too are measured beside each request that has a share of them. The first round of
each size is a warm-up. What cannot be measured is a line too, with the reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from .machine import best_limits
from .model import Facts
from .processes import (
    RIVALS,
    Reply,
    Rival,
    Worker,
    WorkerError,
    busy,
    free_memory,
    usable_cpus,
)

Line = dict[str, Any]
Key = tuple[str, str]
"""An engine and its mode."""

OURS, LLAMA = "hfcore", "llama-cpp-python"
SHORT_PROMPT = 32  # tokens: of first-token and batch measurements
SHORT_CONTEXT = 512
COLD_ROUNDS = 3
SLOW_START = 10.0  # seconds: who needs more starts for one round only
UNDISTURBED, CROWDED, BESIDE = "undisturbed", "twice the threads", "a CPU busy"
GROWS = {"tokens/s"}  # units of which more is better


@dataclass(frozen=True)
class Plan:
    """What is to be measured. `new`: tokens to decode; `patience`: seconds for one request.

    `rates_only`: no first tokens, no memory. `stress`: hfcore disturbed, beside itself undisturbed.
    `isa`: the instruction set that all engines must run.
    """

    threads: int = 2
    rounds: int = 5
    new: int = 48
    prefill: tuple[int, ...] = (128, 512, 2048, 4096)
    depth: tuple[int, ...] = (0, 512, 2048, 4096)
    batch: tuple[int, ...] = (1, 4, 16)
    patience: float = 300.0
    rates_only: bool = False
    stress: bool = False
    isa: str | None = None

    @property
    def lengths(self) -> list[int]:
        """Prompt lengths: one request measures prefill, and decoding at that depth."""
        return sorted({*self.prefill, *self.depth})


@dataclass(frozen=True)
class Place:
    """Where an engine is: its Python, and its version there."""

    python: str
    version: str


class Bench:
    """The measurements of one model. `emit` takes each line as it is done, `tell` what goes on.

    `limits` measures what the machine can do at that moment.
    """

    def __init__(
        self,
        facts: Facts,
        places: Mapping[str, Place],
        plan: Plan,
        limits: Callable[[], Line],
        emit: Callable[[Line], None],
        tell: Callable[[str], None],
    ) -> None:
        self._facts, self._places, self._plan = facts, places, plan
        self._limits, self._emit, self._tell = limits, emit, tell
        self._keys = [(name, mode) for name in places for mode in RIVALS[name].modes]
        self._workers: dict[Key, Worker] = {}
        self._rates: dict[Key, float] = {}
        self._sets: dict[str, str | None] = {}

    def run(self) -> None:
        """Everything, in order."""
        self._say_impossible()
        if not self._plan.rates_only:
            self._cold()
        with ExitStack() as stack:
            try:
                for key in self._keys:
                    self._open(key)
                for length in self._possible():
                    self._length(length)
                if not self._plan.rates_only:
                    self._warm()
                    self._memory()
                for width in self._plan.batch:
                    self._batch(width)
            finally:
                for worker in self._workers.values():
                    stack.callback(worker.end)
        if self._plan.stress:
            self._stress()

    # --- the measurements ---

    def _cold(self) -> None:
        """Process start to first token, in a fresh process, and the memory that took."""
        rounds = min(self._plan.rounds, COLD_ROUNDS)
        found = self._in_turn(
            "first token, cold", self._keys, self._start, rounds,
            enough=lambda reply: bool(reply["seconds"] > SLOW_START),
        )  # fmt: skip
        # Who could not even start once is not asked again: the reason is said already.
        self._keys = [key for key in self._keys if key in found]
        self._write("first token, cold", None, "s", pick(found, "seconds"))
        self._write("peak memory, first token", None, "bytes", pick(found, "bytes"))

    def _start(self, key: Key, round_: int) -> Reply:
        request = {"do": "generate", "ids": self._prompt(SHORT_PROMPT, round_), "new": 1}
        start = time.perf_counter()
        with self._worker(key, self._short_context) as worker:
            worker.send(request)
            self._loaded(key, worker)
            worker.receive(self._plan.patience)
            seconds = time.perf_counter() - start
            return {"seconds": seconds} | worker.ask({"do": "memory"}, self._plan.patience)

    def _length(self, length: int) -> None:
        """Prefill of a prompt, and decoding after it: whichever of them is wanted."""
        prefill, decode = length in self._plan.prefill, length in self._plan.depth
        new = self._plan.new if decode else 1
        what = f"prompt of {length}"

        def request(key: Key, round_: int) -> Reply:
            ids = self._prompt(max(1, length), round_)
            self._is_patient(key, len(ids))
            # All workers are stopped while this is measured.
            before = self._limits()
            reply = self._ask(key, {"do": "generate", "ids": ids, "new": new})
            limits = best_limits(before, self._limits())
            _check(reply["later"], new - 1, [reply["first"], reply["rest"] if new > 1 else 1])
            self._rates[key] = reply["prompt"] / reply["first"]
            return reply | {"limits": limits}

        found = self._in_turn(what, list(self._workers), request, self._plan.rounds)
        limits = pick(found, "limits")
        if prefill:
            rates = {k: [r["prompt"] / r["first"] for r in rs] for k, rs in found.items()}
            self._write("prefill", length, "tokens/s", rates, limits)
        if decode and new > 1:
            rates = {k: [r["later"] / r["rest"] for r in rs] for k, rs in found.items()}
            self._write("decode", length, "tokens/s", rates, limits)

    def _warm(self) -> None:
        """A short prompt to its first token, when all is loaded and has run."""

        def request(key: Key, round_: int) -> Reply:
            ids = self._prompt(SHORT_PROMPT, round_ + 1000)
            return self._ask(key, {"do": "generate", "ids": ids, "new": 1})

        keys = list(self._workers)
        found = self._in_turn("first token, warm", keys, request, self._plan.rounds)
        self._write("first token, warm", None, "s", pick(found, "first"))

    def _memory(self) -> None:
        """The most that each worker had, after all of the above."""

        def request(key: Key, _: int) -> Reply:
            return self._ask(key, {"do": "memory"})

        found = self._in_turn("peak memory", list(self._workers), request, 1, warm_up=False)
        self._write("peak memory, longest prompt", None, "bytes", pick(found, "bytes"))

    def _batch(self, width: int) -> None:
        """So many short prompts at once: all their new tokens by all of the time."""

        def request(key: Key, round_: int) -> Reply:
            salts = range(round_ * width, round_ * width + width)
            prompts = [self._prompt(SHORT_PROMPT, 2000 + salt) for salt in salts]
            reply = self._ask(key, {"do": "batch", "prompts": prompts, "new": self._plan.new})
            _check(reply["tokens"], width * self._plan.new, [reply["seconds"]])
            return reply

        keys = list(self._workers)
        found = self._in_turn(f"batch of {width}", keys, request, self._plan.rounds)
        rates = {k: [r["tokens"] / r["seconds"] for r in rs] for k, rs in found.items()}
        self._write("batch", width, "tokens/s", rates)

    def _stress(self) -> None:
        """hfcore alone: with twice as many threads as CPUs, and with one of its CPUs busy."""
        ours = next((key for key in self._keys if key[0] == OURS), None)
        if ours is None:
            return  # it could not even start, which is said already
        with ExitStack() as stack:
            try:
                request = self._disturbed(ours, stack)
            except WorkerError as error:
                self._absent(ours, str(error), "stress")
                return
            keys = [(OURS, situation) for situation in (UNDISTURBED, CROWDED, BESIDE)]
            found = self._in_turn("stress", keys, request, self._plan.rounds)
        for measure, rate in (
            ("prefill", lambda reply: reply["prompt"] / reply["first"]),
            ("decode", lambda reply: reply["later"] / reply["rest"]),
        ):
            rates = {situation: [*map(rate, replies)] for (_, situation), replies in found.items()}
            self._write_stress(measure, rates)

    def _disturbed(self, ours: Key, stack: ExitStack) -> Callable[[Key, int], Reply]:
        """One request in the situation that a key names. Raises WorkerError."""
        threads, new = self._plan.threads, self._plan.new
        cpus = usable_cpus()[:threads]
        if len(cpus) < threads or new < 2:
            raise WorkerError(
                f"it needs {threads} CPUs to hold a process to and 2 new tokens, "
                f"there are {len(cpus)} and {new}",
                alive=True,
            )

        def start(count: int) -> Worker:
            context = self._stress_length + new + 1
            worker = stack.enter_context(self._worker(ours, context, count, cpus))
            self._loaded(ours, worker)
            worker.stop()
            return worker

        usual, crowded = start(threads), start(2 * threads)

        def request(key: Key, round_: int) -> Reply:
            ids = self._prompt(self._stress_length, 3000 + round_)
            worker = crowded if key[1] == CROWDED else usual
            with busy(cpus) if key[1] == BESIDE else nullcontext():
                reply = worker.ask({"do": "generate", "ids": ids, "new": new}, self._longest)
            _check(reply["later"], new - 1, [reply["first"], reply["rest"]])
            return reply

        return request

    @property
    def _stress_length(self) -> int:
        return max(1, min(SHORT_CONTEXT, self._facts.context_size - self._plan.new - 1))

    # --- turns ---

    def _in_turn(
        self,
        what: str,
        keys: Sequence[Key],
        request: Callable[[Key, int], Reply],
        rounds: int,
        *,
        warm_up: bool = True,
        enough: Callable[[Reply], bool] = lambda _: False,
    ) -> dict[Key, list[Reply]]:
        """Replies of each round after the warm-up; no entry of an engine that failed in one.

        Who goes first alternates: a machine that warms up or slows down favours nobody. After a
        reply that is `enough`, an engine takes no more turns.
        """
        replies: dict[Key, list[Reply]] = {key: [] for key in keys}
        done: set[Key] = set()
        for round_ in range(-1 if warm_up else 0, rounds):
            for key in sorted(replies, key=keys.index, reverse=bool(round_ % 2)):
                self._tell(
                    f"{what}, {f'round {round_ + 1}' if round_ >= 0 else 'warm-up'}: {key[0]}"
                )
                try:
                    reply = request(key, round_ + 1)
                except WorkerError as error:
                    self._absent(key, str(error), what)
                    del replies[key]
                    if not error.alive:
                        self._reopen(key)
                    continue
                if round_ >= 0:
                    replies[key].append(reply)
                    if enough(reply):
                        done.add(key)
        return replies

    def _ask(self, key: Key, request: Reply) -> Reply:
        return self._workers[key].ask(request, self._longest)

    @property
    def _longest(self) -> float:
        """Seconds for a request that was thought to be short enough."""
        return 3 * self._plan.patience + 60

    def _is_patient(self, key: Key, tokens: int) -> None:
        """Refuse what would take too long, by the rate of the prompt before."""
        seconds = tokens / self._rates.get(key, float("inf"))
        if seconds > self._plan.patience:
            raise WorkerError(
                f"it would take about {seconds:.0f} s, the limit is {self._plan.patience:.0f} s",
                alive=True,
            )

    def _prompt(self, tokens: int, salt: int) -> list[int]:
        """Ids without meaning; every round has others, so that no cache of prefixes helps."""
        low = min(1000, self._facts.vocab_size // 8)  # specials stand at the ends
        span = max(1, min(30_000, self._facts.vocab_size - 2 * low))
        return [low + (i * 7919 + (tokens + salt) * 104_729) % span for i in range(tokens)]

    # --- workers ---

    @property
    def _context(self) -> int:
        longest = max(self._possible(), default=0) + self._plan.new + 1
        return max(self._short_context, longest)

    @property
    def _short_context(self) -> int:
        return min(SHORT_CONTEXT, self._facts.context_size)

    def _possible(self) -> list[int]:
        """The lengths that the model's context holds."""
        room = self._facts.context_size - self._plan.new - 1
        return [length for length in self._plan.lengths if length <= room]

    def _say_impossible(self) -> None:
        """A line for each length that the model was not made for."""
        for length in sorted(set(self._plan.lengths) - set(self._possible())):
            wanted, limit = length + self._plan.new + 1, self._facts.context_size
            reason = f"it needs {wanted} tokens of context, the model was made for {limit}"
            self._emit({"kind": "absent", "measure": f"prompt of {length}", "reason": reason})

    def _worker(
        self, key: Key, context: int, threads: int | None = None, cpus: Sequence[int] = ()
    ) -> Worker:
        rival = RIVALS[key[0]]
        self._fits(rival)
        return Worker(
            rival.name, rival.modes[key[1]], python=self._places[rival.name].python,
            model=self._facts.path, threads=threads or self._plan.threads, context=context,
            cpus=cpus,
        )  # fmt: skip

    def _loaded(self, key: Key, worker: Worker) -> None:
        """Wait until it has loaded. Raises WorkerError if it runs another set than is wanted."""
        worker.loaded(self._plan.patience)
        found, wanted = worker.instruction_set, self._plan.isa
        self._sets[key[0]] = found
        if wanted not in {None, found}:
            raise WorkerError(
                f"wanted the instruction set {wanted}, "
                + (f"it runs {found}" if found else "it does not say which it runs")
            )

    def _fits(self, rival: Rival) -> None:
        by_byte, by_parameter = rival.memory
        needed = by_byte * self._facts.size + by_parameter * self._facts.parameters
        free = free_memory()
        if free is not None and needed > free:
            raise WorkerError(
                f"it needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
                alive=True,
            )

    def _open(self, key: Key) -> None:
        """Start a worker and wait until it has loaded; or say why not."""
        self._tell(f"loading: {key[0]} {key[1]}")
        try:
            worker = self._workers[key] = self._worker(key, self._context)
            self._loaded(key, worker)
            worker.stop()
        except WorkerError as error:
            worker_ = self._workers.pop(key, None)
            if worker_ is not None:
                worker_.end()
            self._absent(key, str(error))

    def _reopen(self, key: Key) -> None:
        """In place of a dead worker another, for the measurements that are left."""
        if self._workers.pop(key, None) is not None:
            self._open(key)

    # --- lines ---

    def _absent(self, key: Key, reason: str, what: str | None = None) -> None:
        self._emit({"kind": "absent", "engine": key[0], "mode": key[1], "measure": what,
                    "reason": reason})  # fmt: skip

    def _write(
        self,
        measure: str,
        size: int | None,
        unit: str,
        found: Mapping[Key, Sequence[float]],
        limits: Mapping[Key, Sequence[Line]] | None = None,
    ) -> None:
        """A line for each engine and mode, with its ratio to ours and its share of the limit.

        `limits`: the machine's, beside each round; of prefill and decode.
        """
        found = {key: values for key, values in found.items() if values}
        ours = best((values for key, values in found.items() if key[0] == OURS), unit)
        for key, values in found.items():
            line: Line = {
                "kind": "measure", "measure": measure, "size": size, "engine": key[0],
                "mode": key[1], "version": self._places[key[0]].version,
                "instruction_set": self._sets.get(key[0]), "unit": unit,
            } | _figures(values)  # fmt: skip
            if key[0] != OURS and ours is not None:
                line["ratio"] = ratio(ours, values)
            if limits is not None:
                line |= self._shares(measure, values, limits[key])
            self._emit(line)

    def _write_stress(self, measure: str, rates: Mapping[str, Sequence[float]]) -> None:
        """A line for each disturbance, with what it leaves of the rate."""
        undisturbed = rates.get(UNDISTURBED, [])
        for situation in (CROWDED, BESIDE):
            values = rates.get(situation, [])
            if values and undisturbed:
                self._emit({
                    "kind": "measure", "measure": f"{measure}, {situation}",
                    "size": self._stress_length, "engine": OURS, "mode": "",
                    "version": self._places[OURS].version,
                    "instruction_set": self._sets.get(OURS), "unit": "tokens/s",
                    "undisturbed": _figures(undisturbed)["rounds"],
                    "of_undisturbed": ratio(values, undisturbed),
                } | _figures(values))  # fmt: skip

    def _shares(self, measure: str, rates: Sequence[float], limits: Sequence[Line]) -> Line:
        """Of the limits beside each round. What attention and its cache cost is left out."""
        facts = self._facts
        layers = max(1, facts.layer_parameters)
        name, cost = {
            "prefill": ("int8_operations_per_second", 2 * layers),
            "decode": ("read_bytes_per_second", max(1, facts.token_bytes)),
        }[measure]
        reached = [limit[name] for limit in limits]
        most = [limit / cost for limit in reached]
        share = ratio(rates, most)
        line = {
            "share": share,
            "limit": float(f"{statistics.median(most):.5g}"),
            "limit_rounds": {name: [float(f"{limit:.5g}") for limit in reached]},
        }
        if measure == "prefill":
            of_all = share["median"] * facts.parameters / layers
            line["share_of_all_parameters"] = round(of_all, 4)
        return line


def _figures(values: Sequence[float]) -> Line:
    return {
        "rounds": [float(f"{value:.5g}") for value in values],
        "median": float(f"{statistics.median(values):.5g}"),
    }


def _check(tokens: int, wanted: int, seconds: Sequence[float]) -> None:
    """Refuse a timing of fewer tokens than were asked for, or of no time at all."""
    if tokens != wanted:
        raise WorkerError(f"it decoded {tokens} tokens, {wanted} were asked for", alive=True)
    if min(seconds) <= 0:
        raise WorkerError("its own clock showed no time", alive=True)


def pick(found: Mapping[Key, Sequence[Reply]], field: str) -> dict[Key, list[Any]]:
    """One field of each reply, where there is one.

    >>> pick({("a", ""): [{"x": 2.0}, {"x": None}]}, "x")
    {('a', ''): [2.0]}
    """
    return {
        key: [reply[field] for reply in replies if reply[field] is not None]
        for key, replies in found.items()
    }


def best(candidates: Iterable[Sequence[float]], unit: str) -> Sequence[float] | None:
    """The rounds of the mode whose median is best.

    >>> best([[1.0, 2.0], [3.0]], "tokens/s"), best([[1.0, 2.0], [3.0]], "s")
    ([3.0], [1.0, 2.0])
    """
    choose = max if unit in GROWS else min
    return choose(candidates, key=statistics.median, default=None)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, round by round as far as both have them: the median, and its spread.

    >>> ratio([2.0, 3.0, 4.0], [1.0, 1.0, 4.0])
    {'median': 2.0, 'least': 1.0, 'most': 3.0}
    """
    each = [a / b for a, b in zip(ours, theirs, strict=False)]
    figures = {"median": statistics.median(each), "least": min(each), "most": max(each)}
    return {name: round(figure, 4) for name, figure in figures.items()}


def circumstances(facts: Facts, plan: Plan, limits: Mapping[str, Any]) -> Line:
    """What every line of this model has beside its own."""
    return {
        "model": facts.path.name,
        "model_sha256": facts.sha256,
        "model_bytes": facts.size,
        "model_parameters": facts.parameters,
        "layer_parameters": facts.layer_parameters,
        "token_bytes": facts.token_bytes,
        "threads": plan.threads,
        "isa": plan.isa,
        "new_tokens": plan.new,
        "limits": dict(limits),
    }
