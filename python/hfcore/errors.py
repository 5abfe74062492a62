"""Everything that hfcore raises on purpose, one class per thing the caller can do about it.

    HfcoreError                       catch this for anything of hfcore's own
      ModelFileError      ValueError  a model, tokenizer or template file is cut short or foreign
        ModelNotFoundError  FileNotFoundError   there is no such file
      UnsupportedModelError ValueError          the file is sound, the engine lacks what it asks for
      ModelTooLargeError  MemoryError           weights and cache do not fit into free memory
      NoChatTemplateError ValueError            a chat was asked of a model without a template
      TemplateError       ValueError            the chat template is broken or refused the messages
      InvalidRequestError ValueError            a request that no model could run
        UnknownOptionError  TypeError           an option that nobody knows
        ContextOverflowError                    the prompt does not fit into the context
      RequestTimeoutError TimeoutError          the request took longer than its timeout=
      EngineOverloadedError RuntimeError        too many requests wait already; try again later
      EngineClosedError   RuntimeError          the engine was closed before the request ended
      InternalError       RuntimeError          a defect of hfcore, caught; the engine lives on
      PlacementError      RuntimeError          the model can run neither here nor elsewhere
      RemoteError                               of an endpoint: .status, .request_id, its own words
        RemoteAuthenticationError PermissionError  401: no token, or one that is not taken
        RemoteAccessError   PermissionError     403: a gated model, or none of the token's
        RemoteNotFoundError LookupError         404: no such model, or no such path
        RemoteRequestError (InvalidRequestError)   400, 413, 422, ...: it refuses the request
        RemoteRateLimitError RuntimeError       429: too many requests; .retry_after
        RemoteServerError   RuntimeError        5xx: the server's own fault
        RemoteTimeoutError (RequestTimeoutError)   it was silent for too long, or the time was up
        RemoteConnectionError ConnectionError   nobody there, or gone before it answered
        RemoteResponseError RuntimeError        what came is no answer: a redirect, a page, no JSON
          RemoteStreamError ConnectionError     the stream ended before the answer did

The second column is the built-in class that each also is, so `except ValueError` works as it does
with other libraries. All of them pickle. Example:

    >>> from hfcore.errors import ContextOverflowError, InvalidRequestError
    >>> try:
    ...     raise ContextOverflowError(
    ...         "prompt has 9000 tokens, the context holds 8192", prompt_tokens=9000, limit=8192
    ...     )
    ... except InvalidRequestError as error:
    ...     error.limit
    8192
"""

from __future__ import annotations


class HfcoreError(Exception):
    """The root of hfcore's exceptions."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class ModelFileError(HfcoreError, ValueError):
    """A model, tokenizer or template file is cut short, foreign or inconsistent.

    `path` is the file (or directory) that was read.
    """

    def __init__(self, message: str = "", *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class ModelNotFoundError(ModelFileError, FileNotFoundError):
    """There is no file or directory at `path`."""


class UnsupportedModelError(HfcoreError, ValueError):
    """The file is sound, but asks for something that this engine does not have.

    `what` is the kind of thing ("architecture", "tensor type", ...), `name` the one asked for.
    """

    def __init__(self, message: str = "", *, what: str = "", name: str = "") -> None:
        super().__init__(message)
        self.what = what
        self.name = name


class ModelTooLargeError(HfcoreError, MemoryError):
    """Weights and cache would need `needed` bytes, `available` are free."""

    def __init__(self, message: str = "", *, needed: int = 0, available: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class NoChatTemplateError(HfcoreError, ValueError):
    """A chat was asked of a model that has no chat template.

    Pass `chat_template=` when opening the model, or send a plain text prompt. `model` names it.
    """

    def __init__(self, message: str = "", *, model: str = "") -> None:
        super().__init__(message)
        self.model = model


class TemplateError(HfcoreError, ValueError):
    """The chat template cannot be parsed, or it refused these messages.

    `name` and `line` (1-based, 0 when unknown) say where. `thrown` is True when the template itself
    raised (`raise_exception`), so that another shape of messages may do.
    """

    def __init__(
        self, message: str = "", *, name: str = "", line: int = 0, thrown: bool = False
    ) -> None:
        super().__init__(message)
        self.name = name
        self.line = line
        self.thrown = thrown


class InvalidRequestError(HfcoreError, ValueError):
    """A request that no model could run: a value out of range, a prompt of the wrong type."""


class UnknownOptionError(InvalidRequestError, TypeError):
    """Nobody knows the option `name`; `nearest` is the known name most like it, or None."""

    def __init__(self, message: str = "", *, name: str = "", nearest: str | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.nearest = nearest


class ContextOverflowError(InvalidRequestError):
    """The prompt has `prompt_tokens` tokens, more than the `limit` that fit into the context."""

    def __init__(self, message: str = "", *, prompt_tokens: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class RequestTimeoutError(HfcoreError, TimeoutError):
    """The request took longer than its `timeout` (seconds); it was cancelled."""

    def __init__(self, message: str = "", *, timeout: float = 0.0) -> None:
        super().__init__(message)
        self.timeout = timeout


class EngineOverloadedError(HfcoreError, RuntimeError):
    """`waiting` requests wait already and the queue holds `limit`; a later attempt may do."""

    def __init__(self, message: str = "", *, waiting: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.waiting = waiting
        self.limit = limit


class EngineClosedError(HfcoreError, RuntimeError):
    """The engine was closed before the request ended, or before it began."""


class InternalError(HfcoreError, RuntimeError):
    """A defect of hfcore itself: a panic, caught. The engine lives on; please report it."""


class PlacementError(HfcoreError, RuntimeError):
    """A model can run neither here nor elsewhere: `local` and `remote` say why not."""

    def __init__(self, message: str = "", *, local: str = "", remote: str = "") -> None:
        super().__init__(message)
        self.local = local
        self.remote = remote


class RemoteError(HfcoreError):
    """A request to an endpoint failed.

    `status`: of HTTP, 0 where there was none. `request_id`: the server's, "" where it gave none.
    `server_message`: its own words. No token is ever in any of them.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int = 0,
        request_id: str = "",
        server_message: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.request_id = request_id
        self.server_message = server_message
        self.retry_after = retry_after


class RemoteAuthenticationError(RemoteError, PermissionError):
    """401: the server wants a token, or does not take the one it got."""


class RemoteAccessError(RemoteError, PermissionError):
    """403: the model is gated, or the token may not use it."""


class RemoteNotFoundError(RemoteError, LookupError):
    """404: there is no such model, or no such path."""


class RemoteRequestError(RemoteError, InvalidRequestError):
    """The server refuses the request itself: 400, 413, 422 and others of 4xx."""


class RemoteRateLimitError(RemoteError, RuntimeError):
    """429: too many requests. `retry_after`: seconds, where the server says when to come again."""


class RemoteServerError(RemoteError, RuntimeError):
    """5xx: it is the server's fault; a later attempt may do."""


class RemoteTimeoutError(RemoteError, RequestTimeoutError):
    """The server was silent for `timeout` seconds, or the request took longer than that."""

    def __init__(
        self,
        message: str = "",
        *,
        timeout: float = 0.0,
        status: int = 0,
        request_id: str = "",
    ) -> None:
        super().__init__(message, status=status, request_id=request_id)
        self.timeout = timeout


class RemoteConnectionError(RemoteError, ConnectionError):
    """Nobody answers there, or whoever did was gone before an answer began."""


class RemoteResponseError(RemoteError, RuntimeError):
    """What came is no answer: a redirect (none is followed), a page, no JSON, a line too long."""


class RemoteStreamError(RemoteResponseError, ConnectionError):
    """The stream broke, or ended, before the answer did."""
