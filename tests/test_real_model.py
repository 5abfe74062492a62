"""What must hold on a real model: SmolLM2-135M-Instruct, and Gemma 3 where its window matters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hfcore import Completion, Engine

PROMPTS = [
    "Name three rivers of Europe.",
    "Write a haiku about the sea.",
    "What is 12 times 7?",
    "Explain photosynthesis to a child in two sentences.",
    "Translate 'good morning' into French, German and Spanish.",
    "def fibonacci(n):",
    "Why is the sky blue? " * 20,
    "List the planets of the solar system, and one fact about each of them.",
]
GREEDY = {"max_tokens": 48, "temperature": 0}


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    with Engine(smollm2, context_size=2048) as opened:
        yield opened


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def together(engine: Engine, prompts: list[str], **options: object) -> list[Completion]:
    """All submitted before the first is read."""
    streams = [engine.stream(chat(prompt), **options) for prompt in prompts]
    tokens = [[i for delta in stream for i in delta.token_ids] for stream in streams]
    return [Completion("", tuple(ids), None, None, None) for ids in tokens]


def test_eight_prompts_together_give_the_tokens_of_each_alone(engine: Engine) -> None:
    alone = [engine.generate(chat(prompt), **GREEDY).token_ids for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    assert [done.token_ids for done in together(engine, PROMPTS, **GREEDY)] == alone


def test_a_seed_means_the_same_in_company_and_with_other_threads(
    engine: Engine, smollm2: Path
) -> None:
    options = {"max_tokens": 32, "temperature": 0.9, "top_p": 0.95, "seed": 7}
    alone = [engine.generate(chat(prompt), **options).token_ids for prompt in PROMPTS]
    assert [done.token_ids for done in together(engine, PROMPTS, **options)] == alone
    with Engine(smollm2, context_size=2048, threads=1) as single:
        assert single.generate(chat(PROMPTS[0]), **options).token_ids == alone[0]


def test_a_model_answers_and_ends_by_itself(engine: Engine) -> None:
    done = engine.generate(chat(PROMPTS[0]), max_tokens=200, temperature=0)
    assert "Danube" in done.text
    assert done.finish_reason == "stop"
    assert done.usage is not None
    assert done.usage.prompt_tokens > 10


def test_a_stop_string_across_tokens_ends_the_text_before_it(engine: Engine) -> None:
    whole = engine.generate(chat(PROMPTS[0]), **GREEDY).text
    cut = whole[len(whole) // 2 :][:7]
    done = engine.generate(chat(PROMPTS[0]), **GREEDY, stop=[cut])
    assert done.text == whole[: whole.index(cut)]
    assert done.finish_reason == "stop"
    streamed = [d.text for d in engine.stream(chat(PROMPTS[0]), **GREEDY, stop=[cut])]
    assert "".join(streamed) == done.text


def test_a_base_model_without_a_template_continues_text(gemma3: Path) -> None:
    with Engine(gemma3, context_size=1024) as engine:
        assert engine.chat_template is None
        done = engine.generate("The capital of France is", max_tokens=8, temperature=0)
        assert "capital" in done.text
        # Longer than the window of its local layers.
        long = "The quick brown fox jumps over the lazy dog. " * 70
        assert "fox" in engine.generate(long + "The quick brown", max_tokens=4, temperature=0).text
