"""A request comes while fifteen decode: when it gets its first token, and how long they wait."""

from __future__ import annotations

import statistics
from argparse import Namespace
from pathlib import Path

from hfcore import Engine

from .measure import GREEDY, Line, Reader, Run, ids, opened, run, shown, spread

DECODING, SHORT, PROMPT, CONTEXT = 15, 32, 256, 2048
SETTLED = 12  # tokens of each stream before the other comes: gaps by which the usual is known
AFTER = 4  # tokens of each stream after its first
BAR = {"first_token": 3.0, "gap": 2.0}


def arrival(model: Path, options: Namespace) -> Line:
    """First token beside that of an idle engine; each stream's worst gap beside its usual one."""
    room = {"context_size": CONTEXT, "max_sequences": DECODING + 1}
    with opened(model, options, **room, speculation=False) as engine:
        rounds = [one_round(engine, seed) for seed in range(options.rounds + 1)][1:]
    ratios = [busy.first / idle for idle, busy, _ in rounds]
    gaps = [sorted(gaps) for *_, gaps in rounds]
    over = [sum(gap > BAR["gap"] for gap in each) for each in gaps]
    first = spread(ratios)
    line = {
        "decoding": DECODING, "prompt": PROMPT, "first_token_over_idle": first,
        "idle_ms": [round(1e3 * idle, 1) for idle, *_ in rounds],
        "first_token_ms": [round(1e3 * busy.first, 1) for _, busy, _ in rounds],
        "worst_gap_over_usual": [[round(gap, 2) for gap in each] for each in gaps],
        "streams_over": over,
    }  # fmt: skip
    said = (
        f"first token {shown(ratios)} x idle's, bar {BAR['first_token']}; worst gaps"
        f" {', '.join(f'{each[0]:.2f}-{each[-1]:.2f}' for each in gaps)} x the usual;"
        f" {sum(over)} of {DECODING * len(rounds)} streams over {BAR['gap']} x"
    )
    met = first[1] <= BAR["first_token"] and not any(over)
    return line | {"bar": BAR, "met": met, "said": said}


def one_round(engine: Engine, seed: int) -> tuple[float, Run, list[float]]:
    """Seconds to an idle engine's first token, the newcomer, and worst gaps over the usual."""
    vocabulary = engine.info["vocab_size"]
    prompts = [ids(SHORT, 100 * seed + i, vocabulary) for i in range(DECODING)]
    idle = run(engine, ids(PROMPT, 100 * seed + 50, vocabulary), **GREEDY, max_tokens=1).first
    readers = [Reader(engine, prompt, **GREEDY, max_tokens=CONTEXT // 2) for prompt in prompts]
    try:
        for reader in readers:
            reader.wait(1)
        begun = [len(reader.run.times) for reader in readers]  # now all of them decode
        for reader, tokens in zip(readers, begun, strict=True):
            reader.wait(tokens + SETTLED)
        newcomer = run(engine, ids(PROMPT, 100 * seed + 51, vocabulary), **GREEDY, max_tokens=8)
        for reader in readers:
            reader.wait(len(reader.run.times) + AFTER)
    finally:
        runs = [reader.leave() for reader in readers]
    return (
        idle,
        newcomer,
        [
            worst_over_usual(stream, tokens, newcomer)
            for stream, tokens in zip(runs, begun, strict=True)
        ],
    )


def worst_over_usual(stream: Run, begun: int, newcomer: Run) -> float:
    """A stream's longest wait from the newcomer's asking to its last token, over the usual one."""
    gaps = stream.gaps()[begun:]
    usual = statistics.median(end - start for start, end in gaps if end < newcomer.asked)
    around = [
        end - start for start, end in gaps if end >= newcomer.asked and start <= newcomer.times[-1]
    ]
    return max(around) / usual
