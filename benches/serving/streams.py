"""Sixteen streams at once, over one stream, and over llama-cpp-python that serves one by one."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hfcore import Engine, Usage
from hfcore.bench.processes import RIVALS, Worker, WorkerError, first_python, installed

from .measure import GREEDY, Line, ids, opened, shown, spread, together

STREAMS, PROMPT, NEW, CONTEXT = 16, 32, 64, 512
RIVAL = "llama-cpp-python"
BAR = 4.0
PATIENCE = 600.0


def streams(model: Path, options: Namespace) -> Line:
    """Decoded tokens a second of all streams together; whole requests beside them.

    Without speculation: a model of noise repeats itself more than any text would.
    """
    with ExitStack() as stack:
        line: Line = {"streams": STREAMS, "prompt": PROMPT, "new": NEW}
        rival, line["rival"] = None, "none"
        try:
            worker, mode, line["rival"] = found(model, options)
            stack.callback(worker.end)
            rival = worker
            line["rival_mode"] = mode
        except WorkerError as error:
            line["rival"] = f"not measured: {error}"
        room = {"context_size": CONTEXT, "max_sequences": STREAMS}
        engine = stack.enter_context(opened(model, options, **room, speculation=False))
        rounds = [one_round(engine, rival, seed) for seed in range(options.rounds + 1)][1:]
    for name in rounds[0]:
        line[name] = [round(found[name], 2) for found in rounds]
    ratios = {
        name: [a / b for a, b in zip(line["together"], line[name], strict=True)]
        for name in ("one", "rival_decode")
        if name in line
    }
    met = {name: spread(each)[1] >= BAR for name, each in ratios.items()}
    line |= {f"over_{name}": spread(each) for name, each in ratios.items()}
    said = f"{shown(line['together'])} tokens/s, {shown(ratios['one'])} x one stream"
    if rival is None:
        said += f"; {RIVAL} {line['rival']}"
    else:
        whole = [a / b for a, b in zip(line["whole"], line["rival_whole"], strict=True)]
        line["whole_over_rival"] = spread(whole)
        said += f", {shown(ratios['rival_decode'])} x {RIVAL} (whole requests {shown(whole)} x)"
    return line | {"bar": BAR, "met": all(met.values()) and len(met) == 2, "said": said}


def one_round(engine: Engine, rival: Worker | None, seed: int) -> dict[str, float]:
    """Rates in tokens a second; each round has prompts of its own."""
    vocabulary = engine.info["vocab_size"]
    prompts = [ids(PROMPT, 100 * seed + i, vocabulary) for i in range(STREAMS + 1)]
    wishes: dict[str, Any] = GREEDY | {"max_tokens": NEW}
    one, many = together(engine, prompts[:1], **wishes), together(engine, prompts[1:], **wishes)
    rates = {
        "one": decoded(one), "together": decoded(many),
        "whole": STREAMS * NEW / max(usage.total_time for usage in many),
    }  # fmt: skip
    if rival is not None:
        ends = [
            rival.ask({"do": "generate", "ids": prompt, "new": NEW}, PATIENCE)
            for prompt in prompts[1:]
        ]
        seconds = sum(end["rest"] for end in ends)
        rates["rival_decode"] = sum(end["later"] for end in ends) / seconds
        rates["rival_whole"] = STREAMS * NEW / (seconds + sum(end["first"] for end in ends))
    return rates


def decoded(ends: list[Usage]) -> float:
    """Tokens after each stream's first, by the time from the first of all to the last of all."""
    seconds = max(u.total_time for u in ends) - min(u.time_to_first_token for u in ends)
    return sum(usage.completion_tokens - 1 for usage in ends) / seconds


def found(model: Path, options: Namespace) -> tuple[Worker, str, str]:
    """The rival at its better mode, stopped; that mode, and its version. Raises WorkerError."""
    pythons = [*options.rival_python, sys.executable]
    python, version = first_python(RIVAL, {path: installed(path) for path in pythons})
    rates: dict[str, float] = {}
    for name, mode in RIVALS[RIVAL].modes.items():
        with Worker(
            RIVAL, mode, python=python, model=model, threads=options.threads, context=CONTEXT
        ) as worker:
            worker.loaded(PATIENCE)
            request = {"do": "generate", "ids": list(range(1000, 1000 + PROMPT)), "new": NEW}
            for _ in range(2):
                reply = worker.ask(request, PATIENCE)
            rates[name] = reply["later"] / reply["rest"]
    best = max(rates, key=lambda name: rates[name])
    worker = Worker(
        RIVAL, RIVALS[RIVAL].modes[best], python=python, model=model, threads=options.threads,
        context=CONTEXT,
    )  # fmt: skip
    worker.loaded(PATIENCE)
    worker.stop()
    return worker, best, version
