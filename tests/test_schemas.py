"""Generated JSON schemas and a model of noise: an answer obeys its schema, whatever is sampled.

Keywords and their nesting are drawn from a seed; `format` is not among them. As a program:
`python tests/test_schemas.py 1000` prints the counts, and a second argument names a file for the
cases that went wrong.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema

from hfcore import Engine
from hfcore.engine import Stream
from hfcore.errors import HfcoreError, InvalidRequestError
from hfcore.testing import tiny_model

Schema = dict[str, Any]

TOGETHER = 16
KEYS = ["a", "id", "name", "größe", "名前", "🙂", "two words", 'a "quote"', "back\\slash", "a/b"]
TEXTS = ["", "on", "off", "ü", "日本語", "🙂 ok", "line\nbreak", 'say "x"', "c:\\d", "<|im_end|>"]
CONSTANTS = [
    0, -7, 1.5, 1e-7, True, None, "fest", "é\t", [], [1, [None, "x"]], {}, {"k": [False, {"ü": 2}]},
]  # fmt: skip
PATTERNS = [
    "^[a-f]{2,5}$", "^\\d{3}-\\d{4}$", "^(red|green|blue)$", "[0-9]{2}", "^a*b$", "^.{3,8}$",
    "^\\S+@\\S+\\.(com|org)$", "^[à-ü]{1,4}$", "^\\w+( \\w+){0,2}$", "x$", "^-?[1-9][0-9]*$",
]  # fmt: skip
SHORT_PATTERNS = ["^[a-f]*$", "^[0-9]+$", "^.*$", "^(ab|c)*"]


class Generator:
    """Schemas from a seed. `odd` says that one holds what is unsatisfiable or not supported."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311  # not for secrets
        self.odd = False
        self.defs: Schema = {}

    def schema(self) -> Schema:
        """A whole schema, with the `$defs` that it refers to."""
        made = self.any(self.random.randint(1, 3))
        if self.chance(0.5) and made.get("type") != "object":
            made = self.object(2)
        return {**made, "$defs": self.defs} if self.defs else made

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def any(self, depth: int) -> Schema:
        """A schema of any kind that nests at most `depth` deeper."""
        if self.chance(0.02):
            return self.refused()
        leaves: list[Callable[[], Schema]] = [
            self.string, self.string, self.integer, self.number, self.enum, self.const,
            lambda: {"type": "boolean"}, lambda: {"type": "null"},
            lambda: {"type": ["string", "null"], "maxLength": self.random.randint(0, 4)},
        ]  # fmt: skip
        nests: list[Callable[[int], Schema]] = [
            self.object,
            self.object,
            self.array,
            self.array,
            self.any_of,
            self.one_of,
        ]
        if depth <= 0 or self.chance(0.35):
            return self.random.choice(leaves)()
        if self.chance(0.15):
            return self.reference(depth - 1)
        return self.random.choice(nests)(depth - 1)

    def refused(self) -> Schema:
        """What no value meets, or what is not supported."""
        self.odd = True
        return self.random.choice(
            [
                {"type": "integer", "minimum": 5, "maximum": 3},
                {"type": "string", "minLength": 3, "maxLength": 2},
                {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 1},
                {"enum": []},
                {"type": "object", "properties": {"a": False}, "required": ["a"]},
                {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
                {"not": {"type": "string"}},
                {"type": "object", "dependentRequired": {"a": ["b"]}},
                {"type": "object", "propertyNames": {"pattern": "^a"}},
                {"type": "array", "contains": {"type": "null"}},
                {"type": "object", "minProperties": 2},
                {"if": {"type": "string"}, "then": {"minLength": 2}},
                {"oneOf": [{"type": "number"}, {"type": "integer"}]},
            ]
        )

    def string(self) -> Schema:
        made: Schema = {"type": "string"}
        kind = self.random.randrange(4)
        if kind == 0:
            made["pattern"] = self.random.choice(PATTERNS)
        elif kind == 1:
            least = self.random.randint(0, 12)
            made |= {"minLength": least, "maxLength": least + self.random.randint(0, 12)}
        elif kind == 2:
            made["pattern"] = self.random.choice(SHORT_PATTERNS)
            made["maxLength"] = self.random.randint(2, 9)
        elif self.chance(0.5):
            made["minLength"] = self.random.randint(1, 20)
        return made

    def integer(self) -> Schema:
        low = self.random.choice(
            [0, 1, -5, -1000, 17, 10**12, self.random.randint(-(10**6), 10**6)]
        )
        made: Schema = {"type": "integer", **self.bounds(low, self.random.randint(2, 300))}
        if self.chance(0.1):
            made = {"type": "integer", "multipleOf": self.random.choice([2, 5, 7, 10])}
        return made

    def number(self) -> Schema:
        low = self.random.choice(
            [0, 0.5, -1.25, -300, 1e-3, round(self.random.uniform(-99, 99), 2)]
        )
        return {"type": "number", **self.bounds(low, self.random.choice([0.25, 1.5, 40, 1e5]))}

    def bounds(self, low: float, width: float) -> Schema:
        made: Schema = {}
        if self.chance(0.6):
            made[self.random.choice(["minimum", "exclusiveMinimum"])] = low
        if self.chance(0.6):
            made[self.random.choice(["maximum", "exclusiveMaximum"])] = low + width
        return made

    def enum(self) -> Schema:
        values: list[Any] = self.random.sample(TEXTS, self.random.randint(1, 5))
        if self.chance(0.3):
            values += self.random.sample(CONSTANTS, 2)
        return {"enum": values}

    def const(self) -> Schema:
        return {"const": self.random.choice(CONSTANTS)}

    def object(self, depth: int) -> Schema:
        keys = self.random.sample(KEYS, self.random.randint(0, 5))
        made: Schema = {"type": "object", "properties": {key: self.any(depth) for key in keys}}
        required = [key for key in keys if self.chance(0.6)]
        if required or self.chance(0.5):
            made["required"] = required
        kind = self.random.randrange(4)
        if kind == 0:
            made["additionalProperties"] = self.any(depth - 1)
        elif kind == 1:
            made["additionalProperties"] = self.chance(0.3)
        return made

    def array(self, depth: int) -> Schema:
        made: Schema = {"type": "array"}
        first = self.random.randint(1, 3) if self.chance(0.3) else 0
        if first:
            made["prefixItems"] = [self.any(depth) for _ in range(first)]
        made["items"] = False if first and self.chance(0.3) else self.any(depth)
        most = first if made["items"] is False else first + self.random.randint(0, 5)
        least = self.random.randint(0, most)
        if self.chance(0.7):
            made["minItems"] = least
        if self.chance(0.6):
            made["maxItems"] = most
        return made

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self.random.randint(1, 4))]}

    def one_of(self, depth: int) -> Schema:
        """Alternatives of different types, so that exactly one fits."""
        kinds: list[Callable[[], Schema]] = [
            self.string, self.integer, lambda: {"type": "boolean"}, lambda: {"type": "null"},
            lambda: self.object(depth), lambda: self.array(depth),
        ]  # fmt: skip
        chosen = self.random.sample(kinds, self.random.randint(2, 4))
        return {"oneOf": [make() for make in chosen]}

    def reference(self, depth: int) -> Schema:
        """A `$ref`: to an old definition, or to a new one that may hold itself."""
        if self.defs and self.chance(0.4):
            return {"$ref": f"#/$defs/{self.random.choice(list(self.defs))}"}
        name = f"d{len(self.defs)}"
        self.defs[name] = {}
        again = {"$ref": f"#/$defs/{name}"}
        kind = self.random.randrange(3)
        if kind == 0:
            child = self.random.choice([again, {"anyOf": [again, {"type": "null"}]}])
            node = {"v": self.any(depth - 1), "child": child}
            made: Schema = {"type": "object", "properties": node, "required": ["v"]}
        elif kind == 1:
            made = {"anyOf": [self.string(), {"type": "array", "items": again, "maxItems": 3}]}
        else:
            made = self.any(depth - 1)
            if "$ref" in made:  # a chain of references could lead back to itself
                made = self.integer()
        self.defs[name] = made
        return again


@dataclass(frozen=True)
class Case:
    """A request and what became of it: "valid", "refused", "too small" or something wrong."""

    schema: Schema
    odd: bool
    max_tokens: int
    seed: int
    kind: str = ""
    why: str = ""
    text: str = ""
    finish_reason: str | None = None

    def became(self, kind: str, why: str = "", text: str = "", end: str | None = None) -> Case:
        return Case(self.schema, self.odd, self.max_tokens, self.seed, kind, why, text, end)

    @property
    def wrong(self) -> bool:
        needless = self.kind == "refused" and not self.odd
        return needless or self.kind not in ("valid", "refused", "too small")


def case(seed: int) -> Case:
    generator = Generator(seed)
    schema = generator.schema()
    return Case(schema, generator.odd, generator.random.randint(48, 512), seed)


def submitted(engine: Engine, asked: Case) -> Case | tuple[Case, Stream]:
    """The stream of its answer, or the case as it was refused."""
    named = {"name": "x", "schema": asked.schema}
    try:
        stream = engine.stream(
            [{"role": "user", "content": "Write."}],
            response_format={"type": "json_schema", "json_schema": named},
            temperature=1.5, seed=asked.seed, max_tokens=asked.max_tokens, timeout=100,
        )  # fmt: skip
    except InvalidRequestError as error:
        small = "raise max_tokens" in str(error)
        return asked.became("too small" if small else "refused", reason(str(error)))
    except HfcoreError as error:
        return asked.became("failed", f"{type(error).__name__}: {error}")
    return asked, stream


def reason(message: str) -> str:
    """The kind of a refusal."""
    for words, kind in (
        (r"raise max_tokens", "max_tokens too small"),
        (r"Unimplemented keys: \[(.*?)\]", "unsupported keyword"),
        (r"Unsatisfiable|no text meets it", "unsatisfiable"),
        (r"oneOf constraints are not supported", "oneOf that may overlap"),
        (r"(\w+) \d+ cannot be enforced", "unsupported keyword"),
    ):
        found = re.search(words, message)
        if found:
            return " ".join([kind, *found.groups()])
    return message[:300]


def judged(asked: Case, stream: Stream) -> Case:
    """What the answer is worth."""
    text, end = "", None
    try:
        for delta in stream:
            text += delta.text
            end = delta.finish_reason
        jsonschema.Draft202012Validator(asked.schema).validate(json.loads(text))
    except HfcoreError as error:
        return asked.became("failed", f"{type(error).__name__}: {error}", text)
    except jsonschema.ValidationError as error:
        return asked.became("invalid", f"{error.json_path}: {error.message:.300}", text, end)
    except json.JSONDecodeError as error:
        return asked.became("unfinished", str(error), text, end)
    return asked.became("valid", "", text, end)


def outcomes(model: Path, count: int) -> Iterator[Case]:
    """The cases of the first `count` seeds, judged; some of them are decoded together."""
    running: deque[tuple[Case, Stream]] = deque()
    with Engine(model) as engine:
        for seed in range(count):
            entry = submitted(engine, case(seed))
            if isinstance(entry, Case):
                yield entry
                continue
            running.append(entry)
            if len(running) == TOGETHER:
                yield judged(*running.popleft())
        for entry in running:
            yield judged(*entry)


def test_an_answer_obeys_its_schema_whatever_is_sampled(tiny: Path) -> None:
    count = int(os.environ.get("HFCORE_SCHEMAS", "150"))
    kinds: Counter[str] = Counter()
    for done in outcomes(tiny, count):
        assert not done.wrong, done
        kinds[done.kind] += 1
    assert kinds["valid"] >= count / 2, kinds


def test_the_generator_makes_what_is_refused_and_valid_schemas_only() -> None:
    cases = [case(seed) for seed in range(300)]
    for made in cases:
        jsonschema.Draft202012Validator.check_schema(made.schema)
    assert 10 < sum(made.odd for made in cases) < 150
    assert cases[:9] == [case(seed) for seed in range(9)]


def main(count: int, bad_cases: str | None = None) -> int:
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as directory:
        for done in outcomes(tiny_model(directory), count):
            kinds[done.kind] += 1
            if done.kind in ("refused", "too small"):
                reasons[done.why] += 1
            if done.wrong:
                bad.append(asdict(done))
                print(json.dumps(bad[-1], ensure_ascii=False), flush=True)
    names = ("valid", "refused", "too small", "invalid", "unfinished", "failed")
    print(f"{count} schemas:", ", ".join(f"{kinds[name]} {name}" for name in names))
    print(f"refused though satisfiable and supported: {sum(b['kind'] == 'refused' for b in bad)}")
    for why, times in reasons.most_common():
        print(f"  {times:5} {why}")
    if bad_cases:
        Path(bad_cases).write_text(json.dumps(bad, ensure_ascii=False, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, *sys.argv[2:3]))
