"""What the compiled module promises. mypy.stubtest holds the two together.

All classes are thread-safe: waiting and computing happen without the GIL. Every method may raise
`InvalidRequestError` for an argument of the wrong kind, and `InternalError` for a defect of hfcore.
The examples use `model.gguf`, the demo model that `python -m hfcore.fetch` gets.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "OPTION_NAMES",
    "ChatTemplate",
    "DecodeStream",
    "Delta",
    "Encoder",
    "Engine",
    "Notifier",
    "Stream",
    "TokenLogprob",
    "Tokenizer",
    "Turn",
    "Usage",
    "__version__",
    "dequantize",
    "limits",
    "quantize",
    "quantize_file",
    "read_tensor",
]

__version__: Final[str]
OPTION_NAMES: Final[tuple[str, ...]]
"""The names of the request options that `Engine.submit` knows, without aliases."""

@final
class ChatTemplate:
    """A compiled chat template: Jinja as transformers runs it.

    Messages are OpenAI-shaped mappings. What differs from a plain Jinja environment (the globals,
    the filters, `{% generation %}`, the treatment of None) follows `apply_chat_template`.

    >>> from hfcore import ChatTemplate
    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hello"}])
    '<user>Hello'
    """

    def __new__(
        cls,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        name: str = "chat_template",
    ) -> ChatTemplate:
        """Compile `source`.

        `special_tokens` (`{"bos_token": "<s>", ...}`) become variables; `name` is what errors call
        the template. Raises TemplateError, with the line, when it cannot be parsed.
        """

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = ...,
        keep_none_keys: bool = False,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for these messages.

        Args:
            messages: The conversation.
            tools: Tool definitions, as JSON schema functions; a Python function becomes one by
                `hfcore.schemas.get_json_schema`.
            documents: For templates that know retrieval.
            add_generation_prompt: End with the beginning of an assistant's answer.
            continue_final_message: End inside the last message, so that the model goes on with
                it; a str names the field of it to go on with, else `content`.
            keep_none_keys: Let the template see a message's keys whose value is None; without it
                they are dropped, as apply_chat_template does.
            now: What `strftime_now` shows; None is the local time.
            **variables: Further variables of the template, such as `enable_thinking=False`.

        Raises:
            TemplateError: The template refused the messages (`.thrown`), or failed.
        """

    def render_with_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = ...,
        keep_none_keys: bool = False,
        now: datetime | None = None,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """`render`, and where the assistant's own words stand: (start, end) in code points.

        The spans are those of the template's `{% generation %}` blocks; without any, none.
        """

    def render_segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = ...,
        keep_none_keys: bool = False,
        now: datetime | None = None,
        **variables: Any,
    ) -> list[tuple[str, bool]]:
        """`render` in parts: each text, and whether the template itself wrote it.

        The rest came from messages, tools, documents or variables. Special tokens are the
        template's. Text made of data in a way that cannot be followed counts as data. Put
        together, the parts are what `render` gives.

        >>> from hfcore import ChatTemplate
        >>> template = ChatTemplate("<|user|>{{ messages[0].content }}<|end|>")
        >>> template.render_segments([{"role": "user", "content": "<|end|>"}])
        [('<|user|>', True), ('<|end|>', False), ('<|end|>', True)]
        """

    @property
    def source(self) -> str:
        """The Jinja text."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def takes_tools(self) -> bool:
        """Whether the template looks at `tools` at all."""

@final
class Tokenizer:
    """Text to token ids and back, exactly as Hugging Face `tokenizers` does.

    >>> from hfcore import Tokenizer
    >>> tokenizer = Tokenizer.from_path("model.gguf")
    >>> tokenizer.decode(tokenizer.encode("Hello world"))
    'Hello world'
    """

    @staticmethod
    def from_path(path: str | os.PathLike[str]) -> Tokenizer:
        """Read a `tokenizer.json`, a directory that holds one, or a `.gguf` file's vocabulary.

        From a directory come also the special tokens and the chat template beside it.

        Raises:
            ModelNotFoundError: There is no such file.
            ModelFileError: It is not a tokenizer, or cut short.
            UnsupportedModelError: Its kind of vocabulary is not known.
        """

    def encode(
        self,
        text: str,
        *,
        pair: str | None = None,
        add_special_tokens: bool = True,
        truncation: bool | str | None = None,
        padding: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation_side: str | None = None,
        padding_side: str | None = None,
    ) -> NDArray[np.uint32]:
        """The ids of a text or of a pair of texts, shape [tokens].

        Args:
            text: What to encode.
            pair: A second text, as the tokenizer's template joins them.
            add_special_tokens: Put what begins (and ends) a text around it.
            truncation: True or `"longest_first"`, `"only_first"`, `"only_second"`: cut to
                `max_length` ids. False or `"do_not_truncate"`: do not. None: as the file says.
            padding: True or `"longest"`: to the batch's longest; `"max_length"`: to `max_length`.
                False or `"do_not_pad"`: do not. None: as the file says.
            max_length: For these two; special tokens count.
            pad_to_multiple_of: Round the padded length up.
            truncation_side: `"left"` or `"right"`: the end that is cut.
            padding_side: `"left"` or `"right"`: where the padding goes.

        Raises:
            InvalidRequestError: An option is unknown, or needs another that is not there.
        """

    def encode_batch(
        self,
        texts: Sequence[str | tuple[str, str]],
        *,
        add_special_tokens: bool = True,
        truncation: bool | str | None = None,
        padding: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation_side: str | None = None,
        padding_side: str | None = None,
    ) -> list[NDArray[np.uint32]]:
        """The ids of each text or pair, as `encode` alone would give them; on several threads.

        With a `padding`, all have one length.
        """

    def encodings(
        self,
        texts: Sequence[str | tuple[str, str]],
        *,
        add_special_tokens: bool = True,
        truncation: bool | str | None = None,
        padding: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation_side: str | None = None,
        padding_side: str | None = None,
    ) -> list[dict[str, Any]]:
        """Ids and what belongs to them, of each text or pair; options as in `encode`.

        Arrays of one length: `input_ids`, `token_type_ids`, `attention_mask`,
        `special_tokens_mask`; and `offset_mapping`, a list of (start, end) in code points.
        """

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = ...,
        tokenize: bool = True,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        parse_special_in_content: bool | None = None,
        **variables: Any,
    ) -> Any:
        """A conversation as token ids, through the chat template; names as transformers has them.

        Args:
            conversation: Messages.
            tools: JSON schemas, or functions with type hints and docstrings.
            documents: For templates that know retrieval.
            chat_template: The name of one of the tokenizer's templates, or Jinja source; None: its
                main one, or the one for tools where there are tools.
            add_generation_prompt: End with the beginning of an assistant's answer.
            continue_final_message: End inside the last message.
            tokenize: False: the text.
            return_dict: `{"input_ids": ..., "attention_mask": ...}`, each uint32 of shape [tokens];
                False: the ids alone.
            return_assistant_tokens_mask: Also "assistant_masks": 1 for tokens inside the template's
                `{% generation %}` blocks.
            parse_special_in_content: Whether a message that spells a special token makes one, as in
                transformers. None: no, but for tokenizers that cannot tell; False: an error there.
            **variables: Further variables of the template.

        Raises:
            NoChatTemplateError: There is none.
            TemplateError: The template refused the messages, or failed.

        >>> from hfcore import Tokenizer
        >>> tokenizer = Tokenizer.from_path("model.gguf")
        >>> tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)[:12]
        '<|im_start|>'
        """

    def encode_segments(self, segments: Sequence[tuple[str, bool]]) -> NDArray[np.uint32]:
        """The ids of a text that is given in segments, each with whether it is trusted.

        Special and other added tokens are recognised where it is: what a user wrote cannot become
        one. Else the segments are one text, and the ids are `encode`'s when no untrusted segment
        holds an added token's text. Nothing is put around it.

        Raises:
            UnsupportedModelError: The tokenizer's pipeline cannot tell segments apart.
        """

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of `text` (without special ones) comes from, in code points."""

    def decode(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_special_tokens: bool = True
    ) -> str:
        """The text of `ids`. Raises InvalidRequestError for an id outside the vocabulary."""

    def decode_batch(
        self,
        lists: Sequence[Sequence[int] | NDArray[np.integer[Any]]],
        *,
        skip_special_tokens: bool = True,
    ) -> list[str]:
        """The text of each list of ids; on several threads."""

    def decode_stream(self, *, skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder that takes one id at a time."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it (`"Ġworld"`), None if there is none."""

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it, None if there is none."""

    @property
    def vocab_size(self) -> int:
        """The highest id plus one, added tokens included."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """`{"bos_token": "<s>", ...}`, as far as the files name them."""

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The main chat template that came with the tokenizer, None if none did."""

@final
class DecodeStream:
    """The text of one sequence, id by id. What it gives, joined, is `decode` of all the ids.

    Never half a character, nor a U+FFFD for one that is still to come.
    """

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that is now certain, which may be empty."""

    def finish(self) -> str:
        """End the sequence; returns what was held back. The next push begins a new one."""

@final
class TokenLogprob:
    """A token with its natural log probability in the distribution it was drawn from.

    That is after penalties, biases and temperature (greedy: 1), before top_k, top_p, min_p and
    typical_p cut; for a prompt's tokens it is the model's own distribution.
    """

    @property
    def token(self) -> str:
        """The token's text."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> list[tuple[int, str, float]]:
        """The likeliest tokens of this place, best first: (id, text, log probability)."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class Usage:
    """What a request cost."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def reasoning_tokens(self) -> int | None:
        """Those of the completion that are thoughts; None where these are not told apart."""

    @property
    def time_to_first_token(self) -> float:
        """Seconds from submit to the first token."""

    @property
    def total_time(self) -> float:
        """Seconds from submit to the last token."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class Delta:
    """What a request has produced since the delta before it. A value: it never changes.

    A token each, several where a grammar forces them, and all that came since where the reader is
    64 deltas behind.
    """

    @property
    def index(self) -> int:
        """Which of the request's `n` completions, from 0."""

    @property
    def text(self) -> str:
        """The new text; whole characters, never a part of a stop string."""

    @property
    def reasoning(self) -> str:
        """New text of the model's thoughts, which `text` does not have."""

    @property
    def tool_calls(self) -> list[tuple[int, str | None, str | None, str]]:
        """What it adds to tool calls: (index, id, name, arguments); id and name once a call."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One for each token, when the request asked for them."""

    @property
    def prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Of the prompt's tokens from the second on; in the first delta, when asked for."""

    @property
    def finish_reason(self) -> str | None:
        """`"stop"`, `"length"` or `"tool_calls"` in a completion's last delta, None before."""

    @property
    def usage(self) -> Usage | None:
        """In the last delta only."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class Notifier:
    """Tells an event loop which of its streams have something: a file descriptor to watch.

    One serves all streams of a loop: `loop.add_reader(notifier.fileno(), ...)`, then `drain`.
    """

    def __new__(cls) -> Notifier: ...
    def fileno(self) -> int:
        """Readable while `drain` has something to give. Owned by this object."""

    def drain(self) -> list[int]:
        """The keys of the streams that got something (or ended) since the last call, each once."""

@final
class Stream:
    """The deltas of one request as they come. Dropping or closing it cancels the request.

    The engine never waits for who reads: what a slow reader has not read is merged.
    With `n` above 1 those of its completions are mixed, `Delta.index` tells them apart, and the
    stream ends when all of them have.
    """

    def __iter__(self) -> Stream: ...
    def __next__(self) -> Delta:
        """Wait for the next delta. Ctrl-C interrupts the wait within 0.1 seconds."""

    def try_next(self) -> Delta | None:
        """The next delta if it is there, None if not yet. Raises StopIteration after the last.

        Keeps the GIL, and never waits.
        """

    def subscribe(self, notifier: Notifier, key: int) -> None:
        """From now on put `key` into `notifier` whenever something comes; at once if it has."""

    def close(self) -> None:
        """Cancel the request, unless it has ended. A second call does nothing."""

@final
class Encoder:
    """A model in memory that makes vectors. Calls from several threads take turns.

    `hfcore.sentences.SentenceEncoder` wraps this with model names and sentence-transformers' files.
    """

    def __new__(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_tokens: int | None = None,
        pooling: str = "mean",
        dense: Sequence[str | os.PathLike[str]] = ...,
        progress: Callable[[int, int], object] | None = None,
    ) -> Encoder:
        """Read the checkpoint in a directory. `progress` is called with bytes done and in all.

        `pooling` may be several names with "+" between them: their results lie side by side.
        `dense` are directories of layers that come after it.

        Raises:
            ModelFileError: Something is missing, or not what it says.
            UnsupportedModelError: Its family, its positions or the pooling are not known.
            InvalidRequestError: `max_tokens` leaves no room for text.
        """

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = False,
        left_out: str = "",
        progress: Callable[[int, int], object] | None = None,
    ) -> NDArray[np.float32]:
        """A vector for each text: float32, [texts, width]. `progress` is called with texts.

        `left_out`, with which all texts begin, is left out by poolings that go over all tokens.
        """

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, which cuts texts to `max_tokens`."""

    @property
    def info(self) -> dict[str, Any]:
        """What was loaded: architecture, width, max_tokens."""

@final
class Turn:
    """One turn of a model that another library runs: its prompt, and its answer's text, read.

    What needs a grammar is refused: nothing makes the model follow one.

    >>> from hfcore._core import Turn
    >>> turn = Turn("Once upon", {"stop": ["END"], "max_tokens": 9})
    >>> turn.push(" a time EN"), turn.push("D and"), turn.stopped
    ((' a time ', '', []), ('', '', []), True)
    """

    def __new__(
        cls,
        prompt: Any,
        options: Mapping[str, Any],
        *,
        template: ChatTemplate | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> Turn:
        """A text, or messages for the template, with the options of `Engine.submit`.

        `generation_config`: what applies where these say nothing. Raises as `submit` does.
        """

    def push(
        self, text: str, *, may_stop: bool = True
    ) -> tuple[str, str, list[tuple[int, str | None, str | None, str]]]:
        """Take the text of the next token: (text, reasoning, pieces of calls) that are certain.

        A stop string ends the turn only if it `may_stop`. Pieces as `Delta.tool_calls`.
        """

    def finish(self) -> tuple[str, str, list[tuple[int, str | None, str | None, str]]]:
        """No more text comes: what was held back."""

    @property
    def prompt(self) -> str:
        """What is to be continued."""

    @property
    def options(self) -> dict[str, Any]:
        """The options and the defaults as one, checked."""

    @property
    def markers(self) -> list[str]:
        """Special tokens that must stand in the text that is pushed."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string came, or the end."""

    @property
    def called(self) -> bool:
        """Whether any call began so far."""

    @property
    def in_thought(self) -> bool | None:
        """Whether a thought is under way; None where thoughts are not told from the rest."""

@final
class Engine:
    """A model in memory and the thread that runs its requests together.

    `hfcore.Engine` wraps this with model names, option aliases and asyncio.
    """

    def __new__(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        context_size: int | None = None,
        threads: int | None = None,
        chat_template: str | None = None,
        kv_cache_bytes: int | None = None,
        kv_cache_dtype: str = "f16",
        max_sequences: int | None = None,
        forced_tokens: bool = True,
        prefix_cache: bool = True,
        speculation: bool = True,
        draft_model: str | os.PathLike[str] | None = None,
        adapters: Sequence[tuple[str, str | os.PathLike[str]]] | None = None,
        quantization: tuple[str, bool, list[str]] | None = None,
        quantization_cache: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Engine:
        """Load the model at `path`: a `.gguf` file, or a directory with safetensors.

        Args:
            path: Local file or directory; nothing is downloaded.
            device: `"cpu"`, or `"reference"`: plain f32, slow, for comparisons.
            context_size: Tokens that prompt and completion may have together; None is the model's
                own, as far as the cache's memory reaches.
            threads: Compute threads; None is the cores that this process may use.
            chat_template: Jinja text to use in place of the model's own.
            kv_cache_bytes: Memory for keys and values; None chooses by what is free.
            kv_cache_dtype: What keys and values are kept as: `"f16"`, or `"int8"`, which takes
                about half the memory.
            prefix_cache: Whether requests that begin alike share what has run.
            speculation: Whether tokens are guessed from the text so far, where that is faster.
            draft_model: A smaller model of the same vocabulary that guesses too.
            adapters: Directories of LoRA adapters, by name: a request's `adapter` names one.
            quantization: What a model in F32, F16 or BF16 is quantised to while it is loaded: a
                mixture, whether bitsandbytes' double quantisation is wanted, modules to leave.
            quantization_cache: The file that keeps the outcome; its name says of what it is.
            forced_tokens: Whether tokens that a grammar forces run as one step.
            max_sequences: Requests that run at the same time, others wait; None is 32.
            progress: Called with (bytes done, bytes in all) while loading, from another thread's
                view at any moment; what it raises ends the loading once the step is done.

        Raises:
            ModelNotFoundError: There is nothing at `path`.
            ModelFileError: The files are cut short or foreign.
            UnsupportedModelError: The engine lacks the architecture or a tensor type.
            ModelTooLargeError: Memory does not suffice.
            TemplateError: `chat_template` cannot be parsed.
        """

    def submit(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[int] | NDArray[np.integer[Any]],
        options: Mapping[str, Any],
    ) -> Stream:
        """Start a request; returns when it is queued.

        A str is text (`add_special_tokens` applies), mappings are messages for the chat template,
        ints are token ids as they are. `options` has `OPTION_NAMES`; for messages also `tools`,
        `documents`, `add_generation_prompt`, `continue_final_message`, `template_variables`.

        Raises:
            UnknownOptionError: An option that nobody knows.
            ContextOverflowError: The prompt is longer than the context.
            NoChatTemplateError, TemplateError: The messages cannot be written as a prompt.
            EngineClosedError: After `close`.
        """

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt that `submit` would make of these messages."""

    def logits(
        self,
        ids: Sequence[int] | NDArray[np.integer[Any]],
        *,
        last_only: bool = True,
        adapter: str | None = None,
    ) -> NDArray[np.float32]:
        """The model's raw scores after `ids`: shape [vocab], or [tokens, vocab] for every place."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def chat_template(self) -> ChatTemplate | None: ...
    @property
    def info(self) -> dict[str, Any]:
        """What was loaded: path, architecture, sizes, quantization, device, threads and so on."""

    def metrics(self) -> dict[str, int | float]:
        """Counters since the start: requests, tokens, steps, cache pages, seconds."""

    def save_prefix(self, path: str | os.PathLike[str], identity: str) -> int:
        """Write what the cache holds to a file, under this name of the model; the tokens of it."""

    def load_prefix(self, path: str | os.PathLike[str], identity: str) -> int:
        """Take such a file into the cache; the tokens of it that are there now."""

    def close(self) -> None:
        """End all requests and free the model. A second call does nothing."""

def limits(threads: int, read_bytes: int) -> dict[str, Any]:
    """What this machine can do at most, measured now with so many threads together.

    `read_bytes` are read eight times over; they should be many times the last cache. Keys: threads,
    instruction_set, read_bytes_per_second, int8_operations_per_second (a multiplication and an
    addition are two; exact, in registers).

    Raises:
        ModelTooLargeError: `read_bytes` cannot be allocated.

    >>> from hfcore._core import limits
    >>> limits(1, read_bytes=1 << 22)["threads"]
    1
    """

def quantize(
    type_name: str,
    numbers: NDArray[np.float32],
    *,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Rows of numbers as blocks of a GGUF type: [rows, numbers] -> [rows, bytes].

    `importance`, of the same shape, says how much an error of each number counts.

    >>> import numpy as np
    >>> from hfcore._core import dequantize, quantize
    >>> numbers = np.linspace(-1, 1, 32, dtype=np.float32)[None]
    >>> bool(abs(dequantize("Q8_0", quantize("Q8_0", numbers)) - numbers).max() < 0.005)
    True
    """

def quantize_file(
    source: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    importance: str | os.PathLike[str] | None = None,
    again: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, int]:
    """Write a GGUF file in other types; tensors, bytes_before and bytes. See hfcore.quantize."""

def read_tensor(path: str | os.PathLike[str], name: str) -> NDArray[np.float32]:
    """One tensor of a model file or directory as numbers, in its shape, outermost first.

    Of a quantised checkpoint's matrices, by the names that they would have unquantised: the numbers
    that the format says they are, bit for bit those of its own library in float32. Raises
    `ModelFileError` where there is no tensor of this name.
    """

def dequantize(type_name: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Quantised blocks of a GGUF type as numbers: [n, bytes of a block] -> [n, numbers of a block].

    >>> import numpy as np
    >>> from hfcore._core import dequantize
    >>> scale_1_all_2 = np.array([[0x00, 0x3C] + [2] * 32], dtype=np.uint8)
    >>> dequantize("Q8_0", scale_1_all_2).sum()
    np.float32(64.0)
    """
