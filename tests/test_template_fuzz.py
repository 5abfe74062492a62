"""Hostile templates and variables: an error or a text, soon, in bounded memory; never a panic.

As a program: `python tests/test_template_fuzz.py [SECONDS [SEED]]` runs so long and counts.
"""

# ruff: noqa: E501 (tables of template text read better with more in a line)

from __future__ import annotations

import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from test_template_random import MESSAGES, TEXTS, Case, case

from hfcore import ChatTemplate
from hfcore.errors import HfcoreError, InternalError

MEMORY = 3 << 30
"""What the program may take; a render's own bounds are far below."""

SLOW = 8.0
"""Seconds after which a render counts as hanging; its budget ends it earlier."""

PIECES = [
    "{{", "}}", "{%", "%}", "{#", "#}", "-", "+", "|", ".", "[", "]", "(", ")", "{", "}", ":", ",", "~", "*", "**", "//", "%",
    "==", "<", "'", '"', "\\", "\n", "\0", "\U0001f600", "if ", "for ", "in ", "else", "endfor", "endif", "macro ", "set ", "is ",
    "not ", "and ", "loop", "loop(", "recursive", "caller()", "namespace(", "ns.x", "raw", "endraw", "generation", "call ", "filter ",
    "block ", "with ", "range(99999)", " * 99999999", "'x' * 9999999", "** 99999", "|list", "|map('map')", "|batch(99999)", "|tojson",
    "|center(99999999)", "|indent(9999999)", "|join('x' * 99999)", ".format(", "'%999999d' % 1", "|replace('', 'x' * 9999)", "|string",
    "|sort", "|unique", "|groupby('k')", "[::-1]", "[99999999999999999999:]", ".split('')", ".zfill(99999999)", "|wordwrap(1)",
    "|urlize", "|slice(99999)", "\\N{BULLET}", "\\U0010FFFF", "\\x", "1e999", "99999999999999999999999999999999999999999",
    "|round(-300)", "|truncate(-1)", "|filesizeformat", "|dictsort", "|selectattr('a.b.c')", "**d0", "*l0", "loop.cycle(", "loop.last",
    "loop.nextitem", "loop.length", "{% set ns.l = loop %}", "{{ ns.l.last }}", "{{ ns.l(l0) }}", "{% set ns = namespace(x=[1]) %}",
    "{% set ns.x = ns.x + ns.x %}", "{% set ns.ns = ns %}{{ ns }}", "{% for x in range(99) %}", "{% endfor %}", "{% set ns.x = ns.x|map('e') %}",
    "{% macro m(x) %}", "{{ m(m) }}", "{% endmacro %}", "{% set ns.m = m %}", "{{ ns.m(1) }}", "{% set ns.x = [ns.x] %}",
]  # fmt: skip


class Mutator:
    """Makes a case worse."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def source(self, text: str) -> str:
        """Template text with a few wounds."""
        for _ in range(self.rng.randrange(1, 6)):
            a, b = sorted(self.rng.randrange(len(text) + 1) for _ in range(2))
            b = min(b, a + self.rng.choice([1, 3, 20, 200]))
            text = text[:a] + self.wound(text[a:b]) + text[b:]
        return text[:60_000]

    def wound(self, part: str) -> str:
        """What stands in the place of a part."""
        rng, piece = self.rng, self.rng.choice(PIECES)
        made = {
            "cut": "",
            "before": piece + part,
            "two": piece + rng.choice(PIECES) + part,
            "again": part * rng.choice([2, 3, 40]),
            "backwards": part[::-1],
            "many": piece * rng.choice([1, 30, 500]),
            "other": part + case(rng.randrange(10**6)).source,
        }
        return rng.choice(list(made.values()))

    def variables(self, values: dict[str, Any]) -> dict[str, Any]:
        """Variables with other values, larger or of another kind."""
        rng = self.rng
        large: list[Callable[[], Any]] = [
            lambda: "x" * rng.choice([1, 1000, 300_000]), lambda: 10 ** rng.choice([5, 40, 4000]), lambda: 2.0**1023, lambda: None,
            lambda: rng.choice(TEXTS) * 100, lambda: list(range(rng.choice([0, 3, 20_000]))), lambda: {str(i): i for i in range(500)},
            lambda: [[[[rng.choice(TEXTS)]]]], lambda: -(2**127), lambda: [values], lambda: {"k": {"k": {"k": 1}}}, lambda: "{}" * 999,
            lambda: "%s" * 999, lambda: True, lambda: [{"k": i, "v": "x"} for i in range(300)],
        ]  # fmt: skip
        changed = dict(values)
        for _ in range(rng.randrange(4)):
            changed[rng.choice(list(changed))] = rng.choice(large)()
        return changed


def hostile(seed: int) -> Case:
    """The case of this number, always the same."""
    rng = random.Random(seed)  # noqa: S311 (the same for a seed is what is wanted)
    mutator = Mutator(rng)
    made = case(rng.randrange(10**6))
    return Case(mutator.source(made.source), mutator.variables(made.variables))


def outcome(made: Case) -> str:
    """What became of it: text, an error, or what must not be."""
    start = time.monotonic()
    try:
        template = ChatTemplate(made.source)
        text = template.render(MESSAGES, **made.variables)
        parts = template.render_segments(MESSAGES, **made.variables)
        kind = "text" if "".join(part for part, _ in parts) == text else "segments differ"
    except InternalError as error:
        kind = f"panic: {error}"
    except HfcoreError:
        kind = "error"
    except MemoryError:
        kind = "out of memory"
    except BaseException as error:
        kind = f"{type(error).__name__}: {error}"
    return kind if time.monotonic() - start < SLOW else f"slow {kind}"


def test_hostile_templates_end_in_text_or_an_error() -> None:
    count = int(os.environ.get("HFCORE_FUZZ", "300"))
    kinds = Counter(outcome(hostile(seed)) for seed in range(count))
    assert set(kinds) <= {"text", "error"}, kinds
    assert kinds["text"] > 0


def main(seconds: float, seed: int) -> int:
    """Run so long; print what must not be, with its seed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    kinds: Counter[str] = Counter()
    end, slowest = time.monotonic() + seconds, 0.0
    number = seed
    while time.monotonic() < end:
        start = time.monotonic()
        kind = outcome(hostile(number))
        slowest = max(slowest, time.monotonic() - start)
        kinds[kind] += 1
        if kind not in ("text", "error"):
            print(f"seed {number}: {kind}", flush=True)
        number += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{number - seed} cases from {seed}: {dict(kinds)}; slowest {slowest:.1f} s, {peak} MB")
    return 0 if set(kinds) <= {"text", "error"} else 1


if __name__ == "__main__":
    arguments = [int(text) for text in sys.argv[1:3]]
    sys.exit(main(*(arguments + [60, 0][len(arguments) :])))
