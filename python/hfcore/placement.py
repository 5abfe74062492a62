"""The one rule for where a model runs that may run in two places: here if it can, else at a server.

"auto": here, where the files are there or can be fetched, the family is known and it fits into
memory; else at a server, where a URL or a token was given; else an error with both reasons.
"fallback": here, but a failure to load goes to the server. Only before the first token, and only
for what ails the model or the machine: a request that is wrong here is wrong. Nothing else ever
sends a prompt away. What was chosen, and why, is in every answer and once in the log.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import hub
from .backends import Backend, Deltas, Local
from .connection import in_thread
from .engine import Delta, Engine, Prompt
from .errors import (
    HfcoreError,
    InvalidRequestError,
    ModelFileError,
    ModelTooLargeError,
    PlacementError,
    UnsupportedModelError,
)
from .remote import Remote

_CANNOT_LOAD = (ModelFileError, UnsupportedModelError, MemoryError)
_NO_TENSORS = b"\x02" + bytes(7) + b"{}"
"""A safetensors file without any."""

_log = logging.getLogger("hfcore")


@dataclass(frozen=True)
class _Place:
    """Where it runs, and why there."""

    backend: Backend
    name: str
    why: str

    def check(self, prompt: Prompt) -> None:
        """Refuse what only a server could read."""
        messages = [] if isinstance(prompt, str) or self.backend.takes_parts else prompt
        for position, message in enumerate(messages):
            if isinstance(message, Mapping) and isinstance(message.get("content"), list):
                raise InvalidRequestError(
                    f"message {position} holds more than text; the model runs here, and reads text"
                    " only"
                )

    def noted(self, delta: Delta) -> Delta:
        """A delta; the last one says where it comes from."""
        if delta.finish_reason is None:
            return delta
        about = {**(delta.about or {}), "backend": self.name, "placement": self.why}
        return replace(delta, about=about)


@dataclass
class Placed:
    """A model here, and the same one at a server; which of them is decided when it is first used.

    `auto`: whether what would not fit is not even fetched. `remote`: None where there is none, and
    then `why_not` says why.
    """

    local: Local
    remote: Remote | None
    auto: bool = True
    why_not: str = ""
    _place: _Place | None = field(default=None, init=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def model_name(self) -> str:
        """See `Backend`, as for all of these."""
        return self.local.model_name

    @property
    def context_size(self) -> int | None:
        """Of the model here."""
        return self.local.context_size

    @property
    def takes_parts(self) -> bool:
        """As long as the model here was not chosen; it refuses them then."""
        return self.remote is not None if self._place is None else self._place.backend.takes_parts

    def stream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> Generator[Delta, None, None]:
        """Decide, submit, iterate. Until the first delta a lack of memory here may change it."""
        place = self._decided()
        place.check(prompt)
        try:
            deltas = place.backend.stream(prompt, tools, options)
        except MemoryError as error:
            place = self._elsewhere(error)
            deltas = place.backend.stream(prompt, tools, options)
        return self._relayed(place, deltas, (prompt, tools, options))

    def _relayed(
        self, place: _Place, deltas: Deltas, request: tuple[Any, Any, Any]
    ) -> Generator[Delta, None, None]:
        begun = False
        try:
            with contextlib.closing(deltas):
                for delta in deltas:
                    begun = True
                    yield place.noted(delta)
            return
        except MemoryError as error:
            if begun:
                raise
            place = self._elsewhere(error)
        with contextlib.closing(place.backend.stream(*request)) as others:
            for delta in others:
                yield place.noted(delta)

    async def astream(
        self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> AsyncGenerator[Delta, None]:
        """The same on an event loop; deciding happens in a thread."""
        place = self._place
        if place is None:
            place = await in_thread(self._decided)
        place.check(prompt)
        begun = False
        try:
            async with contextlib.aclosing(place.backend.astream(prompt, tools, options)) as deltas:
                async for delta in deltas:
                    begun = True
                    yield place.noted(delta)
            return
        except MemoryError as error:
            if begun:
                raise
            place = self._elsewhere(error)
        async with contextlib.aclosing(place.backend.astream(prompt, tools, options)) as deltas:
            async for delta in deltas:
                yield place.noted(delta)

    def token_ids(self, text: str) -> list[int]:
        """By the model that runs."""
        return self._decided().backend.token_ids(text)

    def count_tokens(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> int:
        """By the model that runs."""
        return self._decided().backend.count_tokens(prompt, tools)

    def identity(self) -> dict[str, Any]:
        """Both places, since either may have answered."""
        other = {} if self.remote is None else {"elsewhere": self.remote.identity()}
        return {**self.local.identity(), "auto": self.auto, **other}

    def sibling(self, model: str) -> Placed:
        """Another model, by the same rule."""
        other = None if self.remote is None else self.remote.sibling(server_name(model))
        return Placed(self.local.sibling(model), other, self.auto, self.why_not)

    def __deepcopy__(self, memo: object) -> Placed:
        return self

    def __getstate__(self) -> dict[str, Any]:
        kept = ("local", "remote", "auto", "why_not")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # The rule -------------------------------------------------------------------------------------

    def _decided(self) -> _Place:
        """Where it runs; decided now, by loading it, if nobody did before."""
        if self._place is not None:
            return self._place
        with self._lock:
            if self._place is None:
                self._place = self._decide()
            return self._place

    def _decide(self) -> _Place:
        try:
            if self.auto and self.remote is not None:
                self._check_before_fetching()
            self.local.engine.get()
        except _CANNOT_LOAD as error:
            return self._elsewhere(error)
        place = _Place(self.local, "local", "the model could be loaded here")
        _log.info("%s runs here: %s", self.model_name, place.why)
        return place

    def _check_before_fetching(self) -> None:
        """Refuse to fetch what would not fit, or what nobody here knows."""
        place = self.local.engine.place()
        needed = hub.bytes_to_fetch(self.model_name, **place)
        if needed is None:
            return
        config = hub.fetch_config(self.model_name, **place)
        if config is not None:
            _check_family(config)
        free = free_memory()
        if free is not None and needed > free:
            raise ModelTooLargeError(
                f"its files have {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free",
                needed=needed,
                available=free,
            )

    def _elsewhere(self, error: BaseException) -> _Place:
        """The server, for this reason. Raises PlacementError where there is none."""
        local = f"{type(error).__name__}: {error}"
        away = self.why_not
        if self.remote is not None:
            try:
                self.remote.connection.check_reach()
            except HfcoreError as unreachable:
                away = str(unreachable)
        if self.remote is None or away:
            raise PlacementError(
                f"{self.model_name} can run neither here ({local}) nor elsewhere ({away})",
                local=local,
                remote=away,
            ) from error
        why = f"it cannot run here: {local}"
        _log.warning("%s runs at %s: %s", self.model_name, self.remote.model_name, why)
        return _Place(self.remote, "remote", why)


def _check_family(config: Path) -> None:
    """Raise UnsupportedModelError for a config of a family that the engine does not know."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, Path(folder) / "config.json")
        (Path(folder) / "model.safetensors").write_bytes(_NO_TENSORS)
        try:
            Engine(folder).close()
        except UnsupportedModelError:
            raise
        except HfcoreError:  # all else is missing, of course
            return


def server_name(model: str) -> str:
    """What a server calls a model of this name: no quantisation, and of a path the last part.

    >>> server_name("owner/name:Q4_K_M"), server_name("/models/tiny.gguf")
    ('owner/name', 'tiny')
    """
    if hub.looks_local(model) or Path(model).exists():
        return Path(model).stem if model.lower().endswith(".gguf") else Path(model).name
    return model.partition(":")[0]


def free_memory() -> int | None:
    """Bytes of memory that may be taken, where the system says (Linux)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
