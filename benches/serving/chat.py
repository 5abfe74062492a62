"""A chat grows to 3,000 tokens in ten turns: the last turn's first token over the same one cold."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from hfcore import Engine

from .measure import Line, Run, metric, opened, run, shown, spread, text_of_repo

TURNS, TURN, CONTEXT = 10, 300, 4096
ANSWER = 160  # tokens at most; what an answer lacks, the next question has
BAR = 0.1
ROUNDS = 3
Messages = list[dict[str, str]]


def chat(model: Path, options: Namespace) -> Line:
    """Messages through the template, the model's own answers among them, as an app would."""
    rounds = range(min(options.rounds, ROUNDS))
    with (
        opened(model, options, context_size=CONTEXT) as engine,
        opened(model, options, context_size=CONTEXT, prefix_cache=False) as plain,
    ):
        run(plain, question([], plain, 0, TURN * TURNS), max_tokens=1)
        warm, cold, hits = [], [], []
        for seed in rounds:
            messages, last, hit = talk(engine, 1 + seed)
            warm.append(last)
            hits.append(hit)
            cold.append(run(plain, messages, max_tokens=ANSWER, temperature=0))
        same = all(a.ids == b.ids for a, b in zip(warm, cold, strict=True))
    ratios = [a.first / b.first for a, b in zip(warm, cold, strict=True)]
    tokens = [done.usage.prompt_tokens if done.usage else 0 for done in warm]
    line = {
        "turns": TURNS, "prompt_tokens": tokens, "ratio": spread(ratios), "same_answers": same,
        "warm_ms": [round(1e3 * done.first, 2) for done in warm],
        "cold_ms": [round(1e3 * done.first, 2) for done in cold],
        "hit_rate": [round(hit, 4) for hit in hits],
    }  # fmt: skip
    said = (
        f"turn {TURNS} of {tokens[-1]} tokens: first token {shown(ratios)} x cold, bar {BAR};"
        f" hit rate {shown(hits)}; {'the same' if same else 'OTHER'} answers"
    )
    return line | {"bar": BAR, "met": spread(ratios)[1] <= BAR and same, "said": said}


def talk(engine: Engine, seed: int) -> tuple[Messages, Run, float]:
    """A whole chat; the prompt of its last turn, that turn, and what part of it was cached."""
    messages: Messages = []
    before, done = [0.0, 0.0], None
    for turn in range(1, TURNS + 1):
        messages = question(messages, engine, 1000 * seed + turn, turn * TURN)
        before = metric(engine, "prefix_hit_tokens", "prefix_lookup_tokens")
        done = run(engine, messages, max_tokens=ANSWER, temperature=0)
        if turn < TURNS:
            answer = engine.tokenizer.decode(done.ids)
            messages = [*messages, {"role": "assistant", "content": answer}]
    hit, asked = metric(engine, "prefix_hit_tokens", "prefix_lookup_tokens")
    assert done is not None
    return messages, done, (hit - before[0]) / max(1.0, asked - before[1])


def question(messages: Messages, engine: Engine, seed: int, tokens: int) -> Messages:
    """One message more, so that the whole prompt has about so many tokens."""
    asked = [*messages, {"role": "user", "content": "What does this mean?"}]
    left = tokens - len(engine.tokenizer.encode(engine.render(asked)))
    quoted = engine.tokenizer.encode(text_of_repo(seed, max(1, left)))[: max(1, left - 1)]
    asked[-1]["content"] += f"\n{engine.tokenizer.decode(quoted)}"
    return asked
