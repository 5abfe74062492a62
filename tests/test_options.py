"""Names, aliases and layers of options."""

from __future__ import annotations

from typing import Any

import pytest

from hfcore import _core, options
from hfcore.errors import InvalidRequestError, UnknownOptionError, UnsupportedModelError


def test_the_engine_knows_every_sampling_option() -> None:
    elsewhere = {"n", "prompt_logprobs", "add_special_tokens", "timeout", "priority", "adapter"}
    assert set(options.SAMPLING) == set(_core.OPTION_NAMES) - elsewhere


def test_no_alias_hides_a_name_and_none_leads_nowhere() -> None:
    known = {*options.REQUEST, *options.MODEL, *options.UNSUPPORTED, "model", "endpoint_url"}
    assert set(options.ALIASES.values()) <= known
    assert not set(options.ALIASES) & known
    assert not set(options.UNSUPPORTED) & {*options.REQUEST, *options.MODEL}


@pytest.mark.parametrize(
    ("alias", "name"), [(a, n) for a, n in options.ALIASES.items() if n in options.REQUEST]
)
def test_an_alias_means_its_name(alias: str, name: str) -> None:
    value = ["x"] if name == "stop" else 1
    assert options.canonical({alias: value}) == {name: value}


def test_the_strongest_layer_that_sets_an_option_wins() -> None:
    layers: list[dict[str, Any]] = [{"max_new_tokens": None}, {"max_tokens": 2}, {"max_tokens": 3}]
    assert options.merge(*layers) == {"max_tokens": 2}
    assert options.merge({"temperature": 0}, {"temperature": 0.8}) == {"temperature": 0}
    assert options.merge({"stop": []}, {"stop_sequences": ["x"]}) == {"stop": []}


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"do_sample": False}])
def test_greedy_in_a_stronger_layer_drops_sampling_of_weaker_ones(greedy: dict[str, Any]) -> None:
    assert options.merge(greedy, {"temperature": 0.7, "top_p": 0.9, "max_tokens": 4}) == {
        **greedy,
        "max_tokens": 4,
    }


def test_sampling_in_a_stronger_layer_overrules_greedy_in_a_weaker() -> None:
    assert options.merge({"temperature": 0.7}, {"do_sample": False}) == {"temperature": 0.7}
    assert options.merge({"do_sample": True}, {"temperature": 0}) == {"do_sample": True}


def test_a_contradiction_within_one_layer_is_left_for_the_engine_to_refuse() -> None:
    contradiction = {"do_sample": False, "top_p": 0.5}
    assert options.merge(contradiction) == contradiction


def test_two_names_of_one_option_may_agree_but_not_differ() -> None:
    assert options.canonical({"stop": "x", "stop_sequences": ["x"]}) == {"stop": ["x"]}
    with pytest.raises(InvalidRequestError, match="max_tokens=1 and max_new_tokens=2 are the same"):
        options.canonical({"max_tokens": 1, "max_new_tokens": 2})
    with pytest.raises(InvalidRequestError, match="seed is given twice, as 1 and as 2"):
        options.combine({"seed": 1}, {"seed": 2})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("temprature", "temperature"), ("max_token", "max_tokens"), ("topp", "top_p"),
        ("max_new_token", "max_new_tokens"), ("Temperature", "temperature"), ("zzzzzz", None),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_the_nearest(typo: str, meant: str | None) -> None:
    with pytest.raises(UnknownOptionError) as caught:
        options.canonical({typo: None})
    assert (caught.value.name, caught.value.nearest) == (typo, meant)
    assert (f"did you mean {meant!r}" in str(caught.value)) == (meant is not None)


@pytest.mark.parametrize("name", options.UNSUPPORTED)
def test_what_cannot_act_is_refused_with_its_reason(name: str) -> None:
    neutral, reason = options.UNSUPPORTED[name]
    with pytest.raises(InvalidRequestError, match=name) as caught:
        options.canonical({name: object()})
    assert reason in str(caught.value)
    assert all(options.canonical({name: value}) == {} for value in neutral)


def test_one_is_not_mistaken_for_true() -> None:
    with pytest.raises(InvalidRequestError, match="num_beams=True"):
        options.canonical({"num_beams": True})


def test_what_was_bound_is_told_from_what_was_called() -> None:
    bound = options.mark_bound({"max_tokens": 5, "seed": 1})
    call, below = options.call_layers({**bound, "max_new_tokens": 7, "seed": 2}, stop=["x"])
    assert options.merge(call, below)["max_tokens"] == 7
    assert options.merge(call, below)["seed"] == 2
    assert call["stop"] == ["x"]


@pytest.mark.parametrize("value", [None, -1, "cpu", "auto"])
def test_the_cpu_goes_by_many_names(value: object) -> None:
    assert options.device(value) == "cpu"


@pytest.mark.parametrize("value", [0, 1, "cuda", "cuda:1"])
def test_cuda_is_another_package(value: object) -> None:
    with pytest.raises(UnsupportedModelError, match="not supported yet"):
        options.device(value)


@pytest.mark.parametrize("value", ["mps", True, object(), ""])
def test_other_devices_are_unknown(value: object) -> None:
    with pytest.raises(UnsupportedModelError, match="unsupported device"):
        options.device(value)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("f16", "f16"), ("fp16", "f16"), ("auto", "f16"), (1, "f16"),
        ("int8", "int8"), ("q8_0", "int8"), (8, "int8"),
    ],
)  # fmt: skip
def test_the_type_of_the_cache_goes_by_other_libraries_names(value: object, name: str) -> None:
    both = {"type_k": value, "type_v": name}
    assert options.canonical(both, options.MODEL) == {"kv_cache_dtype": name}


@pytest.mark.parametrize("value", ["fp8", "", 2, True, 8.0, ["int8"]])
def test_other_types_of_the_cache_are_refused_with_the_known_ones(value: object) -> None:
    with pytest.raises(InvalidRequestError, match="one of 'f16', 'int8', got"):
        options.canonical({"kv_cache_dtype": value}, options.MODEL)


def test_keys_and_values_are_of_one_type() -> None:
    with pytest.raises(InvalidRequestError, match="the same option, kv_cache_dtype"):
        options.canonical({"type_k": 8, "type_v": 1}, options.MODEL)
