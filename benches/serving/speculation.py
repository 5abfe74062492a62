"""Speculation on a real model: the same answers, faster edits, and free chat that is no slower."""

from __future__ import annotations

import random
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

from hfcore import Completion, Engine

from .measure import REPO, Line, metric, opened, shown, spread, text_of_repo

BAR = {"same": 1.0, "edit": 1.8, "chat": 0.97}
CONTEXT, SAME_NEW, CHAT_NEW = 2048, 48, 160
TOGETHER = 8
FILE = (Path(__file__).parent / "edit.txt").read_text(encoding="utf-8")
RENAMED = (("entries", "items"), ("customer", "buyer"), ("discount", "rebate"))
CHATS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper and a storm.",
    "Explain to a child how a bicycle stays upright.",
    "What should I cook for six friends tonight?",
    "Compare living in a city with living in a village.",
    "Give me some advice on learning to play the piano.",
    "Describe a walk through a forest in autumn.",
    "How do vaccines work?",
)
Messages = list[dict[str, str]]
Engines = dict[bool, Engine]
"""One that guesses (True) and one that does not."""


def speculation(model: Path, options: Namespace) -> Line:
    """All greedy, on an engine that guesses and on one that does not."""
    with (
        opened(model, options, context_size=CONTEXT) as guessing,
        opened(model, options, context_size=CONTEXT, speculation=False) as plain,
    ):
        engines = {True: guessing, False: plain}
        firsts = range(0, options.prompts, TOGETHER)
        different = [n for n in firsts if not same(engines, n, options)]
        line: Line = {"prompts": options.prompts, "batches_that_differ": different}
        edits = [ask(edit_prompt(*names)) for names in RENAMED]
        new = len(guessing.tokenizer.encode(FILE))
        line |= in_turn(engines, "edit", edits, new, options.rounds)
        line["edit_lines_right"] = [
            lines_right(guessing, prompt, names)
            for prompt, names in zip(edits, RENAMED, strict=True)
        ]
        line |= in_turn(engines, "chat", [ask(text) for text in CHATS], CHAT_NEW, options.rounds)
    each_edit, each_chat = line.pop("edit_ratios"), line.pop("chat_ratios")
    met = not different and statistics.median(each_edit) >= BAR["edit"]
    met = met and min(line["chat_by_prompt"]) >= BAR["chat"]
    said = (
        f"{options.prompts} prompts {'OTHER with it' if different else 'the same with it'};"
        f" edit {shown(each_edit)} x, bar {BAR['edit']}, {line['edit_accepted']:.0%} of drafts"
        f" taken (lines as wanted: {line['edit_lines_right']} of {len(lines(FILE))});"
        f" chat {shown(each_chat)} x, medians by prompt from {min(line['chat_by_prompt']):.3f},"
        f" bar {BAR['chat']}, {line['chat_accepted']:.0%} taken"
    )
    return line | {"edit": spread(each_edit), "chat": spread(each_chat), "bar": BAR, "met": met,
                   "said": said}  # fmt: skip


# The same -----------------------------------------------------------------------------------------


def same(engines: Engines, first: int, options: Namespace) -> bool:
    """Whether some prompts get the same tokens alone with drafts as together without."""
    prompts = [varied(n) for n in range(first, min(first + TOGETHER, options.prompts))]
    wishes: dict[str, Any] = {"temperature": 0, "max_tokens": SAME_NEW}
    streams = [engines[False].stream(prompt, **wishes) for prompt in prompts]
    plain = [[i for delta in stream for i in delta.token_ids] for stream in streams]
    drafted = [engines[True].generate(prompt, **wishes) for prompt in prompts]
    return [list(done.token_ids) for done in drafted] == plain


def varied(n: int) -> Messages:
    """A prompt to edit, to quote, to write JSON or to chat, from the repository's own texts."""
    kind, drawn = n % 4, random.Random(n)  # noqa: S311  # not for secrets
    if kind == 0:
        return ask(f"Rename `self` to `this` in:\n\n{excerpt(drawn)}")
    if kind == 1:
        return ask(f"Repeat this text word by word:\n\n{text_of_repo(n, drawn.randint(20, 120))}")
    if kind == 2:
        words = sorted(set(text_of_repo(n, 30).split()))
        return ask(f"Write a JSON array with an object for each of these words: {words}")
    return ask(f"{drawn.choice(CHATS)} Think of this: {text_of_repo(n, drawn.randint(3, 12))}")


def excerpt(drawn: random.Random) -> str:
    """Some lines of the repository's own Python."""
    files = sorted((REPO / "python" / "hfcore").glob("*.py"))
    long = [path for path in files if path.stat().st_size > 2000]
    all_ = drawn.choice(long).read_text(encoding="utf-8").splitlines()
    start = drawn.randrange(max(1, len(all_) - 20))
    return "\n".join(all_[start : start + drawn.randint(5, 20)])


def ask(text: str) -> Messages:
    return [{"role": "user", "content": text}]


# Faster -------------------------------------------------------------------------------------------


def in_turn(engines: Engines, name: str, prompts: list[Messages], new: int, rounds: int) -> Line:
    """Decoding with drafts over without, on neighbouring runs; who goes first alternates."""
    before = metric(engines[True], "drafted_tokens", "accepted_tokens")
    ratios: list[list[float]] = [[] for _ in prompts]
    rates: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(rounds + 1):  # the first is the warm-up
        for i, prompt in enumerate(prompts):
            turn = (True, False) if (round_ + i) % 2 else (False, True)
            pair = {on: decoded(engines[on], prompt, new) for on in turn}
            if round_:
                ratios[i].append(pair[True] / pair[False])
                for on, rate in pair.items():
                    rates[on].append(round(rate, 1))
    drafted, accepted = metric(engines[True], "drafted_tokens", "accepted_tokens")
    return {
        f"{name}_ratios": [ratio for each in ratios for ratio in each],
        f"{name}_by_prompt": [round(statistics.median(each), 3) for each in ratios],
        f"{name}_tokens_per_second": spread(rates[True], 1),
        f"{name}_without": spread(rates[False], 1),
        f"{name}_drafted": drafted - before[0],
        f"{name}_accepted": round((accepted - before[1]) / max(1.0, drafted - before[0]), 4),
    }


def decoded(engine: Engine, prompt: Messages, new: int) -> float:
    """Tokens a second after the first."""
    usage = engine.generate(prompt, temperature=0, max_tokens=new, ignore_eos=True).usage
    assert usage is not None
    return usage.tokens_per_second


def edit_prompt(old: str, new: str) -> str:
    """The form with which a model of 135M copies, though it seldom renames."""
    return (
        f"Rewrite this file with the name `{old}` changed to `{new}`. Copy all other lines"
        f" exactly.\n\n```python\n{FILE}```"
    )


def lines_right(engine: Engine, prompt: Messages, names: tuple[str, str]) -> int:
    """How many of the wanted file's lines the answer has."""
    new = len(engine.tokenizer.encode(FILE)) + 20
    done: Completion = engine.generate(prompt, temperature=0, max_tokens=new)
    got = set(lines(done.text))
    return sum(line in got for line in lines(FILE.replace(*names)))


def lines(text: str) -> list[str]:
    """Those that are not blank."""
    return [line for line in text.splitlines() if line.strip()]
