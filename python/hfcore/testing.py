"""For tests and documentation examples, offline: a tiny model, a scripted backend, a tiny server.

The model knows nothing. It is a llama of 170 kB whose weights are noise, made to prefer printable
characters; the same seed gives the same bytes. It runs through the real engine.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import Delta, Prompt, ToolCall, Usage

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The tiny model's own chat template."""

_MERGES = ["\u0120 t", "h e", "i n", "e r", "a n", "\u0120 a", "r e", "o n", "a t", "\u0120 s",
           "i s", "o r", "e n"]  # fmt: skip
_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LAYERS, _WIDTH, _HEADS, _KV_HEADS, _FFN = 2, 64, 4, 2, 128


def tiny_model(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    context_size: int = 2048,
    chat_template: str | None = CHATML,
    name: str = "tiny",
) -> Path:
    """Write `tiny.gguf` (or another name) into a directory, and return its path.

    A byte-level vocabulary of 272 tokens, 2 layers, 64 wide, Q8_0 weights. `chat_template` None
    leaves it without one.

    >>> import tempfile
    >>> tiny_model(tempfile.mkdtemp()).name
    'tiny.gguf'
    """
    path = Path(directory) / f"{name}.gguf"
    path.write_bytes(_gguf(_metadata(name, context_size, chat_template), _weights(seed)))
    return path


def tiny_encoder(directory: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write a sentence encoder into a directory, and return that.

    A BERT of noise, 2 layers, 32 wide, for texts of up to 64 tokens (bytes), mean pooling.

    >>> import tempfile
    >>> sorted(path.name for path in tiny_encoder(tempfile.mkdtemp()).iterdir())[:2]
    ['1_Pooling', 'config.json']
    """
    import numpy as np

    folder, random = Path(directory), np.random.default_rng(seed)
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *_byte_characters()]
    tokens = {name: i for i, name in enumerate(names)}
    around = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    files: dict[str, Any] = {
        "config.json": {
            "architectures": ["BertModel"], "model_type": "bert", "vocab_size": len(tokens),
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "type_vocab_size": 2,
            "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
        },
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [
                {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}
                for i, name in enumerate(names[:4])
            ],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
                              "trim_offsets": True, "use_regex": False},
            "post_processor": {
                "type": "TemplateProcessing", "pair": [],
                "single": [around[0], {"Sequence": {"id": "A", "type_id": 0}}, around[1]],
                "special_tokens": {
                    name: {"id": name, "ids": [tokens[name]], "tokens": [name]}
                    for name in ("[CLS]", "[SEP]")
                },
            },
            "model": {"type": "BPE", "vocab": tokens, "merges": []},
        },
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling",
             "type": "sentence_transformers.models.Pooling"},
        ],
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
    }  # fmt: skip
    shapes = {
        "embeddings.word_embeddings.weight": (len(tokens), 32),
        "embeddings.position_embeddings.weight": (64, 32),
        "embeddings.token_type_embeddings.weight": (2, 32),
        "embeddings.LayerNorm.weight": (32,), "embeddings.LayerNorm.bias": (32,),
    }  # fmt: skip
    for i in range(2):
        parts = {
            "attention.self.query": (32, 32), "attention.self.key": (32, 32),
            "attention.self.value": (32, 32), "attention.output.dense": (32, 32),
            "attention.output.LayerNorm": (32,), "intermediate.dense": (64, 32),
            "output.dense": (32, 64), "output.LayerNorm": (32,),
        }  # fmt: skip
        for part, shape in parts.items():
            shapes[f"encoder.layer.{i}.{part}.weight"] = shape
            shapes[f"encoder.layer.{i}.{part}.bias"] = shape[:1]
    tensors = {
        name: random.standard_normal(shape, np.float32) * 0.2 + (name.endswith("Norm.weight"))
        for name, shape in shapes.items()
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    return folder


def safetensors(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    r"""A safetensors file of float32 arrays (huggingface/safetensors README).

    >>> import numpy as np
    >>> safetensors({"a": np.zeros(1, np.float32)})[8:]
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}\x00\x00\x00\x00'
    """
    header, body = {}, b""
    for name, tensor in tensors.items():
        data = tensor.astype("<f4").tobytes()
        places = [len(body), len(body) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": places}
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


class Canned:
    """A backend that plays answers from a script, one a request, from the start again at the end.

    An answer is a text (one delta for each word), a list of ToolCall (their arguments in two
    pieces), a list of Delta, or an exception to raise. With `n` in the options it is played n
    times. `requests` holds what was asked, as (prompt, tools, options). A token is a byte of UTF-8.

    >>> backend = Canned("Good day", [ToolCall(0, "c1", "add", '{"a": 1}')])
    >>> [delta.text for delta in backend.stream("Hello?", None, {})]
    ['Good', ' day']
    >>> [delta.finish_reason for delta in backend.stream("1 + 1?", None, {})]
    [None, None, 'tool_calls']
    """

    takes_parts = False

    def __init__(
        self,
        *answers: str | Sequence[Delta] | Sequence[ToolCall] | Exception,
        model_name: str = "canned",
    ) -> None:
        self.answers = answers or ("ok",)
        self.model_name = model_name
        self.context_size = 4096
        self.requests: list[tuple[Prompt, Any, dict[str, Any]]] = []
        self.closed = 0

    def stream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> _Played:
        """Note the request; play the next answer."""
        answer = self.answers[len(self.requests) % len(self.answers)]
        self.requests.append((prompt, tools, dict(options)))
        if isinstance(answer, Exception):
            raise answer
        deltas = _words(prompt, answer) if isinstance(answer, str) else _pieces(prompt, answer)
        n = options.get("n", 1)
        if n > 1:
            deltas = [replace(delta, index=i) for delta in deltas for i in range(n)]
        return _Played(self, deltas)

    async def astream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> AsyncGenerator[Delta, None]:
        """The same for an event loop."""
        import asyncio

        played = self.stream(prompt, tools, options)
        try:
            for delta in played:
                await asyncio.sleep(0)
                yield delta
        finally:
            played.close()

    def token_ids(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def count_tokens(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> int:
        """The bytes of prompt and tools, as Python writes them."""
        return len(f"{prompt}{list(tools or [])}".encode())

    def identity(self) -> dict[str, Any]:
        """Its name."""
        return {"model": self.model_name}

    def sibling(self, model: str) -> Canned:
        """The same script under another name."""
        return Canned(*self.answers, model_name=model)


class _Played(Iterator[Delta]):
    def __init__(self, backend: Canned, deltas: list[Delta]) -> None:
        self._backend = backend
        self._left = iter(deltas)

    def __next__(self) -> Delta:
        return next(self._left)

    def close(self) -> None:
        if next(self._left, None) is not None:
            self._backend.closed += 1
        self._left = iter(())


def _words(prompt: Prompt, answer: str) -> list[Delta]:
    words = answer.split(" ")
    texts = words[:1] + [f" {word}" for word in words[1:]]
    usage = Usage(len(str(prompt).split()), len(texts), 0.01, 0.02)
    deltas = [Delta(text, (i,)) for i, text in enumerate(texts)]
    last = deltas[-1]
    return [*deltas[:-1], Delta(last.text, last.token_ids, None, "stop", usage)]


def _pieces(prompt: Prompt, answer: Sequence[Delta] | Sequence[ToolCall]) -> list[Delta]:
    """The deltas as they are; calls as deltas: a head with the name, then the arguments."""
    deltas: list[Delta] = []
    for item in answer:
        if isinstance(item, Delta):
            deltas.append(item)
            continue
        middle = len(item.arguments) // 2
        head = ToolCall(item.index, item.id, item.name, item.arguments[:middle])
        rest = ToolCall(item.index, None, None, item.arguments[middle:])
        deltas += [
            Delta(token_ids=(i,), tool_calls=(piece,)) for i, piece in ((0, head), (1, rest))
        ]
    if answer and isinstance(answer[0], ToolCall):
        usage = Usage(len(str(prompt).split()), len(deltas), 0.01, 0.02)
        deltas.append(Delta(finish_reason="tool_calls", usage=usage))
    return deltas


@contextlib.contextmanager
def serving(*answers: str, requests: list[Any] | None = None) -> Iterator[str]:
    """A server on 127.0.0.1 that gives these texts by turns, in OpenAI's form; its URL.

    `requests` gets the JSON of what was asked, as (path, body). It streams if asked to, a word at a
    time, and knows chat and text completions only.

    >>> import json, urllib.request
    >>> with serving("Good day") as url:
    ...     asked = json.dumps({"model": "m", "prompt": "Hello"}).encode()
    ...     said = urllib.request.urlopen(urllib.request.Request(f"{url}/completions", asked))
    ...     json.load(said)["choices"][0]["text"]
    'Good day'
    """
    from http.server import ThreadingHTTPServer

    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(answers or ("ok",), requests))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(answers: Sequence[str], requests: list[Any] | None) -> Any:
    from http.server import BaseHTTPRequestHandler

    turns = itertools.cycle(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if requests is not None:
                requests.append((self.path, body))
            if not self.path.endswith("/completions"):
                self.send_error(404)
                return
            chat = self.path.endswith("/chat/completions")
            pieces = [delta.text for delta in _words(body, next(turns))]
            if body.get("stream"):
                self._send("text/event-stream", _events(pieces, body, chat=chat))
            else:
                self._send("application/json", json.dumps(_whole(pieces, body, chat=chat)))

        def _send(self, kind: str, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its name there
            """Say nothing."""

    return Handler


def _whole(pieces: list[str], body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    text = "".join(pieces)
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choice = {"index": 0, **said, "finish_reason": "stop"}
    return {"model": body["model"], "choices": [choice], "usage": _counts(pieces)}


def _events(pieces: list[str], body: Mapping[str, Any], *, chat: bool) -> str:
    events: list[Any] = []
    for piece in pieces:
        said = {"delta": {"content": piece}} if chat else {"text": piece}
        events.append({"index": 0, **said, "finish_reason": None})
    events.append(
        {"index": 0, **({"delta": {}} if chat else {"text": ""}), "finish_reason": "stop"}
    )
    chunks = [{"model": body["model"], "choices": [choice]} for choice in events]
    if body.get("stream_options"):
        chunks.append({"model": body["model"], "choices": [], "usage": _counts(pieces)})
    return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"


def _counts(pieces: list[str]) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": len(pieces), "total_tokens": 3 + len(pieces)}


# The tiny model -----------------------------------------------------------------------------------


def _metadata(name: str, context_size: int, chat_template: str | None) -> dict[str, Any]:
    tokens = [*_byte_characters(), *(m.replace(" ", "") for m in _MERGES), *_SPECIALS]
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": name,
        "llama.context_length": context_size,
        "llama.embedding_length": _WIDTH,
        "llama.block_count": _LAYERS,
        "llama.feed_forward_length": _FFN,
        "llama.attention.head_count": _HEADS,
        "llama.attention.head_count_kv": _KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": _WIDTH // _HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - len(_SPECIALS)) + [3] * len(_SPECIALS),
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    if chat_template is not None:
        values["tokenizer.chat_template"] = chat_template
    return values


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in a GPT-2 vocabulary, in the order of the bytes."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def _weights(seed: int) -> dict[str, NDArray[Any]]:
    """Noise, but for coordinate 0.

    The residual stream keeps that constant, so that the output can hold a bias per token there:
    printable ones are likely, the end token is rare.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    kv_width = _WIDTH // _HEADS * _KV_HEADS
    vocab = 256 + len(_MERGES) + len(_SPECIALS)

    def noise(rows: int, columns: int, keep_first: bool = False) -> NDArray[np.float32]:
        matrix = random.standard_normal((rows, columns), np.float32)
        matrix *= columns**-0.5
        if keep_first:
            matrix[0] = 0
        return matrix

    embedding = noise(vocab, _WIDTH) * 8
    embedding[:, 0] = 4
    output = noise(vocab, _WIDTH) * 2
    output[:, 0] = -8
    output[[10, *range(32, 127), *range(256, 256 + len(_MERGES))], 0] = 0
    output[vocab - 1, 0] = -1
    tensors = {"token_embd.weight": embedding}
    for i in range(_LAYERS):
        tensors |= {
            f"blk.{i}.attn_norm.weight": np.ones(_WIDTH, np.float32),
            f"blk.{i}.attn_q.weight": noise(_WIDTH, _WIDTH),
            f"blk.{i}.attn_k.weight": noise(kv_width, _WIDTH),
            f"blk.{i}.attn_v.weight": noise(kv_width, _WIDTH),
            f"blk.{i}.attn_output.weight": noise(_WIDTH, _WIDTH, keep_first=True),
            f"blk.{i}.ffn_norm.weight": np.ones(_WIDTH, np.float32),
            f"blk.{i}.ffn_gate.weight": noise(_FFN, _WIDTH),
            f"blk.{i}.ffn_up.weight": noise(_FFN, _WIDTH),
            f"blk.{i}.ffn_down.weight": noise(_WIDTH, _FFN, keep_first=True),
        }
    return tensors | {"output_norm.weight": np.ones(_WIDTH, np.float32), "output.weight": output}


def _gguf(metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """A GGUF file of version 3: matrices as Q8_0, vectors as F32, data aligned to 32 bytes."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        kind, block = (8, _q8_0(tensor)) if tensor.ndim == 2 else (0, tensor.tobytes())
        dims = struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape))
        place = struct.pack("<IQ", kind, len(body))
        head += _string(name) + struct.pack("<I", tensor.ndim) + dims + place
        body += block + bytes(-len(block) % 32)
    return head + bytes(-len(head) % 32) + body


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with its type tag: bool 7, uint32 4, float32 6, string 8, array 9."""
    if isinstance(value, list):
        items = [_value(item) for item in value]
        return (
            struct.pack("<I", 9)
            + items[0][:4]
            + struct.pack("<Q", len(items))
            + b"".join(item[4:] for item in items)
        )
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", 8) + _string(value)


def _q8_0(matrix: NDArray[Any]) -> bytes:
    """Blocks of 32 values: a float16 scale, then 32 int8."""
    import numpy as np

    blocks = matrix.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    safe = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.clip(np.round(blocks / safe), -127, 127).astype(np.int8)
    return np.hstack([scales.view(np.int8).reshape(-1, 2), codes]).tobytes()
