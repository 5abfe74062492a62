"""What an engine says of itself: a dict of numbers, and Prometheus' text, read back strictly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hfcore import Engine, InvalidRequestError
from hfcore.metrics import KNOWN, completed, exposition

_NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'model="((?:[^"\\\n]|\\["\\n])*)"'
_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|Inf)|NaN"
_SAMPLE = re.compile(rf"({_NAME})\{{{_LABEL}\}} ({_NUMBER})")


def read(text: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Name -> (type, {model: value}). Every metric once, after its help and type, as 0.0.4 says."""
    assert text.endswith("\n")
    found: dict[str, tuple[str, dict[str, float]]] = {}
    lines = iter(text.removesuffix("\n").split("\n"))
    name, helped = "", ""
    for line in lines:
        if line.startswith("# HELP "):
            _, _, helped, words = line.split(" ", 3)
            assert re.fullmatch(_NAME, helped)
            assert "\\" not in words
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == helped
            assert name not in found
            assert kind in ("counter", "gauge")
            assert name.endswith("_total") == (kind == "counter")
            found[name] = (kind, {})
        else:
            sample = _SAMPLE.fullmatch(line)
            assert sample, line
            assert sample[1] == name
            model = re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), sample[2])
            assert model not in found[name][1]
            found[name][1][model] = float(sample[3])
    assert all(values for _, values in found.values())
    return found


def test_numbers_follow_what_the_engine_did(tiny: Path) -> None:
    with Engine(tiny, context_size=128) as engine:
        fresh = engine.metrics()
        assert fresh["requests"] == fresh["tokens_per_second"] == 0
        usage = engine.generate("Hello", max_tokens=6, ignore_eos=True).usage
        assert usage is not None
        numbers = engine.metrics()
    assert numbers["requests"] == 1
    assert numbers["prompt_tokens"] == usage.prompt_tokens
    assert numbers["completion_tokens"] == 6
    assert numbers["running"] == numbers["waiting"] == 0
    assert numbers["tokens_per_second"] > 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say it")
def test_memory_is_that_of_the_process(tiny: Path) -> None:
    with Engine(tiny, context_size=128) as engine:
        lines = Path("/proc/self/status").read_text().splitlines()
        resident = next(1024 * int(x.split()[1]) for x in lines if x.startswith("VmRSS"))
        assert abs(engine.metrics()["memory_bytes"] - resident) < 16e6


def test_prometheus_reads_every_number(tiny: Path) -> None:
    with Engine(tiny, context_size=128) as engine:
        engine.generate("Hello", max_tokens=6, ignore_eos=True)
        numbers, found = engine.metrics(), read(engine.metrics_text())
    assert len(found) == len(numbers)
    for name in ("requests", "prompt_tokens", "completion_tokens", "pages_total", "running"):
        assert found[f"hfcore_{KNOWN[name][0]}"][1] == {str(tiny): numbers[name]}
    assert found["hfcore_completion_tokens_total"] == ("counter", {str(tiny): 6})


def test_known_names_are_counters_or_gauges_and_none_is_used_twice() -> None:
    assert len({shown for shown, _, _ in KNOWN.values()}) == len(KNOWN)
    numbers = dict.fromkeys(KNOWN, 1)
    assert len(read(exposition([("m", numbers)]))) == len(KNOWN)


def test_an_unknown_number_is_a_gauge_by_its_own_name() -> None:
    found = read(exposition([("m", {"new_things": 1.5, "odd_total": 2e-9})], prefix="p"))
    assert found == {"p_new_things": ("gauge", {"m": 1.5}), "p_odd": ("gauge", {"m": 2e-9})}


def test_several_engines_stand_under_one_head_and_labels_are_escaped() -> None:
    odd = 'a"b\\c\nd\\n'
    text = exposition([(odd, {"running": 1, "waiting": 0}), ("other", {"running": 3})])
    assert read(text) == {
        "hfcore_requests_running": ("gauge", {odd: 1, "other": 3}),
        "hfcore_requests_waiting": ("gauge", {odd: 0}),
    }


@pytest.mark.parametrize("prefix", ["", "1x", "a b", "a-b", "a\n"])
def test_a_prefix_is_the_beginning_of_a_name(prefix: str) -> None:
    with pytest.raises(InvalidRequestError, match="prefix"):
        exposition([], prefix)


def test_rates_follow_from_what_is_counted() -> None:
    counted = {
        "completion_tokens": 30, "seconds_busy": 2.0, "prefix_lookup_tokens": 40,
        "prefix_hit_tokens": 10, "drafted_tokens": 0, "accepted_tokens": 0,
    }  # fmt: skip
    rates = completed(counted)
    assert rates["tokens_per_second"] == 15
    assert rates["prefix_hit_rate"] == 0.25
    assert rates["acceptance_rate"] == 0
    plain = completed({"completion_tokens": 30, "seconds_busy": 3.0})
    assert plain["tokens_per_second"] == 10
    assert not {"prefix_hit_rate", "acceptance_rate"} & set(plain)
