"""One engine on one model in a process of its own; requests and replies are lines of JSON.

    python worker.py ENGINE MODEL.gguf THREADS CONTEXT MODE

It stands alone: another Python runs it, which has a rival and no hfcore, so nothing of hfcore is
imported here but by the adapter that needs it. The first reply says that the model is loaded, and
which instruction set the engine runs, where it says so: {"load", "instruction_set"}. Then

    {"do": "generate", "ids": [...], "new": n}      {"prompt", "first", "rest", "later"}
    {"do": "batch", "prompts": [[...]], "new": n}   {"seconds", "tokens"}
    {"do": "logprobs", "ids": [...]}                {"logprobs": [...]}
    {"do": "memory"}                                {"bytes"}

`first` is seconds to the first token, `rest` of the `later` ones; all greedy, none ends early.
`logprobs`: the natural log probability of each id after the first, given those before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

Ids = list[int]
Reply = dict[str, Any]


class Adapter:
    """An engine with a model open: what it takes to time it."""

    def generate(self, ids: Ids, new: int) -> Reply:
        """Decode `new` tokens after `ids`."""
        raise NotImplementedError

    def batch(self, prompts: list[Ids], new: int) -> Reply:
        """Decode `new` tokens after each prompt, all at once."""
        raise NotImplementedError("it cannot decode several at once")

    def logprobs(self, ids: Ids) -> Reply:
        """What the model gives each of `ids` after those before it."""
        raise NotImplementedError("it does not give a prompt's log probabilities")

    def instruction_set(self) -> str | None:
        """What it computes with, by hfcore's names; None where it does not say."""
        return None


class _Hfcore(Adapter):
    """Through the public API, as a user would."""

    def __init__(self, model: str, threads: int, context: int, mode: Reply) -> None:
        import hfcore

        # Every token is computed, as the others compute it: none guessed, none found in the cache.
        plain = {"prefix_cache": False, "speculation": False} | dict(mode)
        self._engine = hfcore.Engine(model, threads=threads, context_size=context, **plain)

    def generate(self, ids: Ids, new: int) -> Reply:
        start = time.perf_counter()
        arrivals = [(time.perf_counter(), len(delta.token_ids)) for delta in self._stream(ids, new)]
        first = arrivals[0][0]
        return {
            "prompt": len(ids),
            "first": first - start,
            "rest": arrivals[-1][0] - first,
            "later": sum(count for _, count in arrivals[1:]),
        }

    def batch(self, prompts: list[Ids], new: int) -> Reply:
        start = time.perf_counter()
        streams = [self._stream(ids, new) for ids in prompts]
        tokens = sum(len(delta.token_ids) for stream in streams for delta in stream)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def logprobs(self, ids: Ids) -> Reply:
        wishes = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": True}
        first, *_ = self._engine.stream(ids, **wishes)
        return {"logprobs": [each.logprob for each in first.prompt_logprobs or ()]}

    def instruction_set(self) -> str | None:
        return str(self._engine.info["instruction_set"])

    def _stream(self, ids: Ids, new: int) -> Any:
        return self._engine.stream(ids, max_tokens=new, temperature=0, ignore_eos=True)


class _LlamaCpp(Adapter):
    """llama-cpp-python's own loop without its sampler: greedy by numpy."""

    BATCH = 512
    SETS = (("AVX512_BF16", "avx512bf16"), ("AVX512_VNNI", "avx512vnni"), ("AVX512", "avx512"),
            ("AVX_VNNI", "avxvnni"), ("AVX2", "avx2"))  # fmt: skip

    def __init__(self, model: str, threads: int, context: int, mode: Reply) -> None:
        import llama_cpp

        self._api, self._threads, self._mode = llama_cpp, threads, mode
        self._contexts: dict[tuple[int, int], Any] = {}
        self._llama = llama_cpp.Llama(
            model, n_ctx=context, n_batch=self.BATCH, n_threads=threads,
            n_threads_batch=threads, verbose=False, **mode,
        )  # fmt: skip

    def generate(self, ids: Ids, new: int) -> Reply:
        self._llama.reset()
        start = time.perf_counter()
        self._llama.eval(ids)
        token = self._greedy(self._llama.ctx, -1)
        first = time.perf_counter()
        for _ in range(new - 1):
            self._llama.eval([token])
            token = self._greedy(self._llama.ctx, -1)
        rest = time.perf_counter() - first
        return {"prompt": len(ids), "first": first - start, "rest": rest, "later": new - 1}

    def batch(self, prompts: list[Ids], new: int) -> Reply:
        """One sequence each, through the library's C interface; the context is kept, as ours is."""
        api = self._api
        key = len(prompts), max(map(len, prompts)) + new
        if key not in self._contexts:
            wanted = self._parameters(*key, sum(map(len, prompts)))
            self._contexts[key] = api.llama_init_from_model(self._llama.model, wanted)
        context = self._contexts[key]
        api.llama_memory_clear(api.llama_get_memory(context), True)
        batch = api.llama_batch_init(sum(len(ids) + new for ids in prompts), 0, 1)
        try:
            start = time.perf_counter()
            texts = [list(ids) for ids in prompts]
            done = [0] * len(texts)
            for _ in range(new):
                ends = self._decode(context, batch, texts, done)
                done = [len(text) for text in texts]
                for text, end in zip(texts, ends, strict=True):
                    text.append(self._greedy(context, end))
            seconds = time.perf_counter() - start
        finally:
            api.llama_batch_free(batch)
        return {"seconds": seconds, "tokens": new * len(prompts)}

    def logprobs(self, ids: Ids) -> Reply:
        """It must be open with `logits_all`."""
        import numpy as np

        self._llama.reset()
        self._llama.eval(ids)
        found = []
        for scores, token in zip(self._llama.scores, ids[1:], strict=False):
            row = scores.astype(np.float64)  # one at a time: a vocabulary may be large
            row -= row.max()
            found.append(float(row[token] - np.log(np.exp(row).sum())))
        return {"logprobs": found}

    def instruction_set(self) -> str | None:
        """The best that it was built for: it looks for none at run time."""
        said = self._api.llama_print_system_info().decode()
        return next((name for flag, name in self.SETS if f" {flag} = 1" in said), None)

    def _parameters(self, sequences: int, longest: int, tokens: int) -> Any:
        """Of a context for so many texts of that length; their prompts' tokens are one batch."""
        api = self._api
        wanted = api.llama_context_default_params()
        wanted.n_seq_max = sequences
        # Rounded up, because a context of several sequences is cut into equal, padded parts.
        wanted.n_ctx = sequences * -(-longest // 256) * 256
        wanted.n_batch = tokens
        wanted.n_ubatch = self.BATCH
        wanted.n_threads = wanted.n_threads_batch = self._threads
        on = self._mode.get("flash_attn", False)
        wanted.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if on else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        return wanted

    def _decode(self, context: Any, batch: Any, texts: list[Ids], done: list[int]) -> list[int]:
        """One step over what is not done of each text; where each one's logits stand."""
        ends, row = [], 0
        for sequence, (text, begin) in enumerate(zip(texts, done, strict=True)):
            for position in range(begin, len(text)):
                batch.token[row] = text[position]
                batch.pos[row] = position
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = position == len(text) - 1
                row += 1
            ends.append(row - 1)
        batch.n_tokens = row
        status = self._api.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return ends

    def _greedy(self, context: Any, row: int) -> int:
        import numpy as np

        logits = self._api.llama_get_logits_ith(context, row)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._llama.n_vocab(),))))


class _MistralRs(Adapter):
    """It takes text alone: ids are put into words, and its own counts and times are used."""

    def __init__(self, model: str, threads: int, context: int, mode: Reply) -> None:
        del threads, context, mode  # RAYON_NUM_THREADS says the threads; the context grows
        import mistralrs

        self._api = mistralrs
        path = Path(model)
        self._runner = mistralrs.Runner(
            which=mistralrs.Which.GGUF(
                quantized_model_id=str(path.parent), quantized_filename=path.name
            ),
            prefix_cache_n=0,
        )

    def generate(self, ids: Ids, new: int) -> Reply:
        usage = self._send(self._text(ids), new)
        return {
            "prompt": usage.prompt_tokens,
            "first": usage.total_prompt_time_sec,
            "rest": usage.total_completion_time_sec,
            "later": usage.completion_tokens - 1,
        }

    def batch(self, prompts: list[Ids], new: int) -> Reply:
        texts = [self._text(ids) for ids in prompts]
        with ThreadPoolExecutor(len(texts)) as pool:
            start = time.perf_counter()
            usages = list(pool.map(lambda text: self._send(text, new), texts))
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(usage.completion_tokens for usage in usages)}

    def _text(self, ids: Ids) -> str:
        """A text of as many tokens, or nearly: decoding and encoding do not undo each other."""
        runner = self._runner
        again = runner.tokenize_text(runner.detokenize_text(ids, False), False, None)
        return str(runner.detokenize_text(again[: len(ids)], False))

    def _send(self, text: str, new: int) -> Any:
        request = self._api.CompletionRequest(
            model="default", prompt=text, max_tokens=new, temperature=0.0, ignore_eos=True
        )
        return self._runner.send_completion_request(request).usage


class _OpenVino(Adapter):
    """Its pipeline, fed with ids; its own times."""

    def __init__(self, model: str, threads: int, context: int, mode: Reply) -> None:
        del context  # it grows
        import openvino_genai

        self._api = openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(
            model, "CPU", INFERENCE_NUM_THREADS=threads, **mode
        )

    def generate(self, ids: Ids, new: int) -> Reply:
        metrics = self._run([ids], new).perf_metrics
        each = metrics.get_tpot().mean / 1000 if new > 1 else 0.0
        first = metrics.get_ttft().mean / 1000
        return {"prompt": len(ids), "first": first, "rest": each * (new - 1), "later": new - 1}

    def batch(self, prompts: list[Ids], new: int) -> Reply:
        start = time.perf_counter()
        answers = self._run(prompts, new)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(len(tokens) for tokens in answers.tokens)}

    def _run(self, prompts: list[Ids], new: int) -> Any:
        import numpy as np
        import openvino

        wish = self._api.GenerationConfig()
        wish.max_new_tokens = new
        wish.do_sample = False
        wish.ignore_eos = True
        ids = np.array(prompts, dtype=np.int64)
        inputs = self._api.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return self._pipeline.generate(inputs, wish)


class _Transformers(Adapter):
    """Its model without its generate loop, which only adds to the time."""

    def __init__(self, model: str, threads: int, context: int, mode: Reply) -> None:
        del context  # it grows
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        path = Path(model)
        self._model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=getattr(torch, mode["dtype"])
        ).eval()

    def generate(self, ids: Ids, new: int) -> Reply:
        first, rest = self._run([ids], new)
        return {"prompt": len(ids), "first": first, "rest": rest, "later": new - 1}

    def batch(self, prompts: list[Ids], new: int) -> Reply:
        return {"seconds": sum(self._run(prompts, new)), "tokens": new * len(prompts)}

    def _run(self, prompts: list[Ids], new: int) -> tuple[float, float]:
        ids = self._torch.tensor(prompts)
        start = time.perf_counter()
        step = self._model(ids, use_cache=True, logits_to_keep=1)
        ids = step.logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(new - 1):
            step = self._model(ids, past_key_values=step.past_key_values, use_cache=True)
            ids = step.logits[:, -1:].argmax(-1)
        return first - start, time.perf_counter() - first


ADAPTERS: dict[str, Callable[[str, int, int, Reply], Adapter]] = {
    "hfcore": _Hfcore,
    "llama-cpp-python": _LlamaCpp,
    "mistralrs": _MistralRs,
    "openvino-genai": _OpenVino,
    "transformers": _Transformers,
}


def peak_memory() -> int | None:
    """The most bytes that this process had in memory; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def answer(adapter: Adapter, request: Reply) -> Reply:
    """What a request gives; an engine's own exception is an answer too."""
    try:
        if request["do"] == "generate":
            return adapter.generate(request["ids"], request["new"])
        if request["do"] == "batch":
            return adapter.batch(request["prompts"], request["new"])
        if request["do"] == "logprobs":
            return adapter.logprobs(request["ids"])
        return {"bytes": peak_memory()}
    except Exception as error:  # whatever a rival raises is to be said, not to end the run
        return {"error": f"{type(error).__name__}: {error}"}


def die_with_parent() -> None:
    """Be ended by the system with the harness, even while stopped; and before it, if memory ends.

    Both are Linux's own; elsewhere the end of the input ends a worker.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def own_stdout() -> TextIO:
    """The way to the harness; what an engine prints goes to stderr instead."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def main(arguments: list[str]) -> None:
    """Load, say so, and answer until the input ends."""
    engine, model, threads, context, mode = arguments
    die_with_parent()
    replies = own_stdout()

    def reply(value: Reply) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    start = time.perf_counter()
    adapter = ADAPTERS[engine](model, int(threads), int(context), json.loads(mode))
    seconds = time.perf_counter() - start
    reply({"load": seconds, "instruction_set": adapter.instruction_set()})
    for line in sys.stdin:
        reply(answer(adapter, json.loads(line)))


if __name__ == "__main__":
    # Python puts this file's directory first, where a rival's import might find our modules.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".") != Path(__file__).parent]
    main(sys.argv[1:])
