"""An OpenAI-shaped server that notes every request, refuses what the schema does not have, answers.

It answers by the script that a test gives, else by itself: a call when tools are to be called, JSON
for an answer format, an echo. Its sense is that of a parrot: texts in JSON are the user's own, a
number is the first one that the user wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from .loopback import Exchange, Loopback, Request
from .schema import refusal

Action = Callable[[Exchange], None]
CREATED = 1_700_000_000


@dataclass(frozen=True)
class Answer:
    """What to say to one request. None: as the server does by itself."""

    text: str | None = None
    reasoning: str | None = None
    calls: Sequence[tuple[str, str]] | None = None
    """Names and arguments, in JSON or not."""
    finish_reason: str | None = None
    model: str | None = None
    """What the server says that it ran."""
    pieces: Sequence[str] | None = None
    """The text as a stream cuts it."""
    reasoning_field: str = "reasoning_content"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Choice:
    """One answer of a chat, whole."""

    text: str
    pieces: list[str]
    reasoning: str
    calls: list[tuple[str, str]]
    finish_reason: str


class Recording(Loopback):
    """A strict server that records.

    Args:
        script: answers, or actions of `faults`, for the requests to come, in order.
        extensions: takes what vLLM and TGI take beside OpenAI's fields.
        serves: what an address without a path is for, "generation" (TGI) or "features" (TEI).
        only_chat: knows no text generation, as most providers.
        token: answers 401 to others.
        max_batch: most texts of one request for embeddings.
        model: the model that it has; it answers with the name that a request gives.
    """

    def __init__(
        self,
        *script: Answer | Action,
        extensions: bool = False,
        serves: str = "generation",
        only_chat: bool = False,
        token: str | None = None,
        max_batch: int | None = None,
        model: str = "recorded/model",
    ) -> None:
        super().__init__()
        self.script: deque[Answer | Action] = deque(script)
        self.extensions = extensions
        self.serves = serves
        self.only_chat = only_chat
        self.token = token
        self.max_batch = max_batch
        self.model = model

    @property
    def asked(self) -> list[Request]:
        """The requests for answers: all but GET."""
        return [request for request in self.requests if request.method == "POST"]

    def handle(self, exchange: Exchange) -> None:
        """Next of the script, or by itself."""
        request = exchange.request
        if request.method == "GET":
            return self._about(exchange)
        step = self.script.popleft() if self.script else Answer()
        if not isinstance(step, Answer):
            return step(exchange)
        if self.token and request.token != self.token:
            return self._fail(exchange, 401, "Invalid username or password.")
        kind = self._kind(request.path, request.json)
        if kind is None or (self.only_chat and kind in ("generate", "completion")):
            return self._fail(exchange, 404, f"Not Found: POST {request.path}")
        if not isinstance(request.json, dict):
            return self._fail(exchange, 400, "We could not parse the JSON body of your request.")
        refused = refusal(kind, request.json, extensions=self.extensions)
        if refused:
            return self._fail(exchange, 422, refused, kind)
        answer: Callable[[Exchange, dict[str, Any], Answer], None] = getattr(self, f"_{kind}")
        return answer(exchange, request.json, step)

    def _kind(self, path: str, body: Any) -> str | None:
        path = path.partition("?")[0].rstrip("/")
        for end, kind in _PATHS.items():
            if path.endswith(end):
                return kind
        if path.endswith("/generate_stream"):
            return "generate"
        if path.count("/") > 1:
            return None
        return "features" if self.serves == "features" else "generate"

    def _about(self, exchange: Exchange) -> None:
        if exchange.request.path.endswith("/models"):
            model = {"id": self.model, "object": "model", "created": CREATED, "owned_by": "tests"}
            return exchange.reply_json(200, {"object": "list", "data": [model]})
        return self._fail(exchange, 404, f"Not Found: GET {exchange.request.path}")

    def _fail(self, exchange: Exchange, status: int, words: str, kind: str = "chat") -> None:
        exchange.reply_json(status, error_body(words, status, kind), self._headers())

    def _headers(self, answer: Answer | None = None) -> dict[str, str]:
        return {"X-Request-Id": f"rec-{len(self.requests)}", **(answer.headers if answer else {})}

    # Chat ---------------------------------------------------------------------------------------

    def _chat(self, exchange: Exchange, body: dict[str, Any], answer: Answer) -> None:
        choices = [_choice(body, answer)] * body.get("n", 1)
        about = {
            "id": f"chatcmpl-{len(self.requests)}", "created": CREATED,
            "model": answer.model or body["model"], "system_fingerprint": "recording",
        }  # fmt: skip
        if body.get("stream"):
            return self._stream(exchange, body, answer, choices, about)
        said = [
            {"index": index, "message": _message(choice, answer),
             "finish_reason": choice.finish_reason,
             "logprobs": _logprobs(choice.pieces, body) if body.get("logprobs") else None}
            for index, choice in enumerate(choices)
        ]  # fmt: skip
        whole = {**about, "object": "chat.completion", "choices": said,
                 "usage": _usage(body, choices)}  # fmt: skip
        return exchange.reply_json(200, whole, self._headers(answer))

    def _stream(
        self, exchange: Exchange, body: dict[str, Any], answer: Answer, choices: list[_Choice],
        about: dict[str, Any],
    ) -> None:  # fmt: skip
        about = {**about, "object": "chat.completion.chunk"}
        exchange.begin(headers=self._headers(answer))
        for turn in zip_longest(*(_deltas(choice, body, answer) for choice in choices)):
            for index, part in enumerate(turn):
                if part is not None:
                    exchange.event({**about, "choices": [{"index": index, **part}]})
        if body.get("stream_options", {}).get("include_usage"):
            exchange.event({**about, "choices": [], "usage": _usage(body, choices)})
        exchange.event("[DONE]")
        exchange.end()

    # Texts --------------------------------------------------------------------------------------

    def _completion(self, exchange: Exchange, body: dict[str, Any], answer: Answer) -> None:
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        about = {"id": f"cmpl-{len(self.requests)}", "object": "text_completion",
                 "created": CREATED, "model": answer.model or body["model"]}  # fmt: skip
        limit, stops = body.get("max_tokens", 16), body.get("stop")
        found = [_cut(answer, f" {prompt}", limit, stops)
                 for prompt in prompts for _ in range(body.get("n", 1))]  # fmt: skip
        counts = _counts(sum(len(split(p)) for p in prompts), sum(len(p) for p, _ in found))
        if body.get("stream"):
            exchange.begin(headers=self._headers(answer))
            for index, (pieces, reason) in enumerate(found):
                for piece in [*pieces, None]:
                    choice = {"index": index, "text": piece or "", "logprobs": None,
                              "finish_reason": None if piece is not None else reason}  # fmt: skip
                    exchange.event({**about, "choices": [choice]})
            if body.get("stream_options", {}).get("include_usage"):
                exchange.event({**about, "choices": [], "usage": counts})
            exchange.event("[DONE]")
            return exchange.end()
        choices = [{"index": index, "text": "".join(pieces), "finish_reason": reason,
                    "logprobs": _old_logprobs(pieces) if body.get("logprobs") else None}
                   for index, (pieces, reason) in enumerate(found)]  # fmt: skip
        whole = {**about, "choices": choices, "usage": counts}
        return exchange.reply_json(200, whole, self._headers(answer))

    def _generate(self, exchange: Exchange, body: dict[str, Any], answer: Answer) -> None:
        path = exchange.request.path.rstrip("/")
        asked = body.get("parameters", {})
        prompt = body["inputs"]
        pieces, reason = _cut(
            answer, f" {prompt}", asked.get("max_new_tokens", 20), asked.get("stop")
        )
        reason = {"stop": "eos_token", "stop_sequence": "stop_sequence"}.get(reason, reason)
        if asked.get("stop") and reason == "eos_token":
            reason = "stop_sequence" if _stopped(answer, prompt, asked["stop"]) else reason
        text = (prompt if asked.get("return_full_text") else "") + "".join(pieces)
        tokens = [{"id": n, "text": piece, "logprob": -0.5, "special": False}
                  for n, piece in enumerate(pieces)]  # fmt: skip
        details = {"finish_reason": reason, "generated_tokens": len(pieces),
                   "seed": asked.get("seed"), "input_length": len(split(prompt))}  # fmt: skip
        if body.get("stream") or path.endswith("/generate_stream"):
            exchange.begin(headers=self._headers(answer))
            for n, token in enumerate(tokens, 1):
                last = n == len(tokens)
                exchange.event({"index": n, "token": token, "top_tokens": [],
                                "generated_text": text if last else None,
                                "details": details if last else None})  # fmt: skip
            return exchange.end()
        whole: dict[str, Any] = {"generated_text": text}
        if asked.get("details"):
            prefill = [{"id": n, "text": piece, "logprob": None if n == 0 else -0.5}
                       for n, piece in enumerate(split(prompt))]  # fmt: skip
            kept = prefill if asked.get("decoder_input_details") else []
            whole["details"] = {**details, "prefill": kept, "tokens": tokens}
        body_out: Any = whole if path.endswith("/generate") else [whole]
        return exchange.reply_json(200, body_out, self._headers(answer))

    # Embeddings ---------------------------------------------------------------------------------

    def _embeddings(self, exchange: Exchange, body: dict[str, Any], answer: Answer) -> None:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if self._too_many(exchange, texts):
            return None
        size = body.get("dimensions", 8)
        rows = [{"object": "embedding", "index": index, "embedding": vector(text, size)}
                for index, text in enumerate(texts)]  # fmt: skip
        tokens = sum(len(split(text)) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        whole = {"object": "list", "data": rows, "model": body["model"], "usage": usage}
        return exchange.reply_json(200, whole, self._headers(answer))

    def _features(self, exchange: Exchange, body: dict[str, Any], answer: Answer) -> None:
        texts = [body["inputs"]] if isinstance(body["inputs"], str) else body["inputs"]
        if self._too_many(exchange, texts):
            return None
        before = f"{body['prompt_name']}: " if "prompt_name" in body else ""
        vectors = [vector(before + text, body.get("dimensions", 8)) for text in texts]
        return exchange.reply_json(200, vectors, self._headers(answer))

    def _too_many(self, exchange: Exchange, texts: list[str]) -> bool:
        if self.max_batch is None or len(texts) <= self.max_batch:
            return False
        words = f"batch size {len(texts)} > maximum allowed batch size {self.max_batch}"
        self._fail(exchange, 422, words, "features")
        return True


_PATHS = {
    "/chat/completions": "chat",
    "/completions": "completion",
    "/embeddings": "embeddings",
    "/pipeline/feature-extraction": "features",
    "/embed": "features",
    "/generate": "generate",
}


def error_body(words: str, status: int, kind: str = "chat") -> dict[str, Any]:
    """An error as the servers of that kind of request say it."""
    if kind in ("generate", "features"):
        named = {422: "validation", 429: "overloaded", 503: "overloaded"}.get(status, "generation")
        return {"error": words, "error_type": named}
    named = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": words, "type": named, "param": None, "code": None}}


def split(text: str) -> list[str]:
    """A text as the tokens of this server."""
    return re.findall(r"\s?\S{1,4}|\s", text)


def vector(text: str, size: int = 8) -> list[float]:
    """An embedding of a text: numbers of -1 to 1 that f32 holds, other for every text."""
    digest = hashlib.sha512(text.encode()).digest()
    return [(digest[n % len(digest)] - 128) / 128 for n in range(size)]


# What it says by itself ---------------------------------------------------------------------------


def _choice(body: dict[str, Any], answer: Answer) -> _Choice:
    given = answer.text is not None or answer.calls is not None or answer.pieces is not None
    calls = list(answer.calls or ()) if given else _calls(body)
    text = answer.text or "".join(answer.pieces or ())
    if not given and not calls:
        text = _text(body)
    limit = body.get("max_tokens", body.get("max_completion_tokens"))
    form = body.get("response_format", {}).get("type", "text")
    stops = body.get("stop")
    if given or form != "text":
        limit, stops = None, None
    pieces, reason = _cut(Answer(text, pieces=answer.pieces), text, limit, stops)
    reason = answer.finish_reason or ("tool_calls" if calls else reason)
    return _Choice("".join(pieces), pieces, answer.reasoning or "", calls, reason)


def _cut(
    answer: Answer, otherwise: str, limit: int | None, stops: str | list[str] | None
) -> tuple[list[str], str]:
    """The pieces of an answer up to its limit or a stop string, and why it ends."""
    text = otherwise if answer.text is None and answer.pieces is None else answer.text
    text = "".join(answer.pieces or ()) if text is None else text
    reason = answer.finish_reason or "stop"
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.partition(stop)[0]
    whole = list(answer.pieces) if answer.pieces is not None else split(text)
    if limit is not None and len(whole) > limit:
        whole, reason = whole[:limit], "length"
    return whole, reason


def _stopped(answer: Answer, prompt: str, stops: Sequence[str]) -> bool:
    text = answer.text if answer.text is not None else f" {prompt}"
    return any(stop in text for stop in stops)


def _calls(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A call if one is asked for, or if the user speaks of a tool."""
    tools = [tool["function"] for tool in body.get("tools", ())]
    choice = body.get("tool_choice", "auto")
    text = said(body)
    if isinstance(choice, dict):
        tools = [tool for tool in tools if tool["name"] == choice["function"]["name"]]
    elif choice == "auto":
        new = body["messages"][-1]["role"] == "user"
        tools = [tool for tool in tools if new and _spoken_of(tool["name"], text)]
    elif choice == "none":
        tools = []
    return [
        (tool["name"], json.dumps(example(tool.get("parameters", {}), text), ensure_ascii=False))
        for tool in tools[:1]
    ]


def _spoken_of(name: str, text: str) -> bool:
    words = {part for part in name.lower().split("_") if len(part) > 3}
    return any(part in text.lower() for part in words)


def _text(body: Mapping[str, Any]) -> str:
    form = body.get("response_format", {"type": "text"})
    text = said(body)
    if form["type"] == "json_schema":
        schema = form["json_schema"]["schema"]
        return json.dumps(example(schema, text), ensure_ascii=False)
    if form["type"] == "json_object":
        keys = re.findall(r"['\"`](\w+)['\"`]", text) or ["answer"]
        return json.dumps(dict.fromkeys(keys, text), ensure_ascii=False)
    return f"You said: {text}"


def said(body: Mapping[str, Any]) -> str:
    """The text of the last message that a user wrote."""
    for message in reversed(body["messages"]):
        if message["role"] == "user":
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            return "\n".join(part.get("text", "") for part in parts)
    return ""


def example(schema: Mapping[str, Any], text: str, root: Any = None, depth: int = 0) -> Any:
    """A value that the schema allows, made of what the user wrote."""
    root = schema if root is None else root
    if "$ref" in schema:
        place = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        return example(place, text, root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for among in ("anyOf", "oneOf", "allOf"):
        if among in schema:
            some = [s for s in schema[among] if s.get("type") != "null"]
            return example(some[0], text, root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        names = schema.get("properties", {})
        kept = names if depth < 6 else schema.get("required", ())
        return {name: example(names[name], text, root, depth + 1) for name in kept}
    if kind == "array":
        count = schema.get("minItems", 1 if depth < 6 else 0)
        return [example(schema.get("items", {}), text, root, depth + 1)] * count
    if kind in ("integer", "number"):
        return _number(schema, text)
    return {"boolean": True, "null": None}.get(kind, text[: schema.get("maxLength")])


def _number(schema: Mapping[str, Any], text: str) -> int:
    low, high = schema.get("minimum"), schema.get("maximum")
    low = schema["exclusiveMinimum"] + 1 if "exclusiveMinimum" in schema else low
    high = schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else high
    found = re.search(r"\d+", text)
    value = int(found[0]) if found else 0
    value = value if low is None else max(value, low)
    return int(value if high is None else min(value, high))


# How it says it -----------------------------------------------------------------------------------


def _message(choice: _Choice, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text}
    if choice.reasoning:
        message[answer.reasoning_field] = choice.reasoning
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": args}}
            for n, (name, args) in enumerate(choice.calls)
        ]
    return message


def _deltas(choice: _Choice, body: Mapping[str, Any], answer: Answer) -> Iterator[dict[str, Any]]:
    """The parts of a streamed choice."""

    def part(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"delta": delta, "logprobs": None, "finish_reason": reason}

    yield part({"role": "assistant", "content": ""})
    for piece in split(choice.reasoning):
        yield part({answer.reasoning_field: piece})
    for piece in choice.pieces:
        known = _logprobs([piece], body) if body.get("logprobs") else None
        yield {**part({"content": piece}), "logprobs": known}
    for index, (name, arguments) in enumerate(choice.calls):
        begun = {"index": index, "id": f"call_{index}", "type": "function"}
        yield part({"tool_calls": [{**begun, "function": {"name": name, "arguments": ""}}]})
        for piece in split(arguments):
            yield part({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield part({}, choice.finish_reason)


def _logprobs(pieces: Sequence[str], body: Mapping[str, Any]) -> dict[str, Any]:
    def one(piece: str, logprob: float) -> dict[str, Any]:
        return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}

    others = body.get("top_logprobs", 0)
    return {
        "content": [
            {**one(piece, -0.5), "top_logprobs": [one(piece, -0.5 - n) for n in range(others)]}
            for piece in pieces
        ],
        "refusal": None,
    }


def _old_logprobs(pieces: Sequence[str]) -> dict[str, Any]:
    starts = [sum(map(len, pieces[:n])) for n in range(len(pieces))]
    return {"tokens": list(pieces), "token_logprobs": [-0.5] * len(pieces),
            "top_logprobs": None, "text_offset": starts}  # fmt: skip


def _usage(body: Mapping[str, Any], choices: Sequence[_Choice]) -> dict[str, Any]:
    asked = sum(len(split(json.dumps(message))) for message in body["messages"])
    thought = sum(len(split(choice.reasoning)) for choice in choices)
    spoken = sum(len(c.pieces) + sum(len(split(a)) for _, a in c.calls) for c in choices)
    counts = _counts(asked, thought + spoken)
    return {**counts, "completion_tokens_details": {"reasoning_tokens": thought}}


def _counts(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion}  # fmt: skip
