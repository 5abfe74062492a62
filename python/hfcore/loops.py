"""Streams on event loops, without a thread for each: asyncio (uvloop too) and trio.

A loop watches one file descriptor, that of its `_core.Notifier`, for all its streams. The engine
never waits for a reader, nor takes the GIL: what a slow one has not read is merged.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from . import _core

if TYPE_CHECKING:
    import asyncio

    import trio

Submit = Callable[[], _core.Stream]
"""Starts a request. Rendering and encoding a long prompt takes a while: not on a loop's thread."""

SUBMITTERS = 2
"""Requests of a loop that its own pool of threads submits at a time. Light ones are not for it: at
each the loop might wait 5 ms for the GIL, many times what submitting takes."""

TURN = 0.0005
"""Seconds of submitting light requests, and"""
WOKEN = 32
"""streams that are woken, before the loop gets to do other things."""


class Reader(Protocol):
    """One stream on the event loop that made it."""

    async def next(self) -> _core.Delta | None:
        """The next delta; None after the last. Raises what submitting or running raised."""

    def close(self) -> None:
        """Cancel the request, if it is still running; never waits."""


def reader(submit: Submit, *, light: bool) -> Reader:
    """Submit a request and read its stream, on the event loop that runs now.

    `light`: submitting takes well below a millisecond. Raises RuntimeError where there is no loop
    of asyncio or trio.
    """
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return _TrioReader(submit)
    import asyncio

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError("async methods run in an event loop of asyncio or trio") from None
    try:
        pump: _Pump = _pumps.get(loop) or _pumps.setdefault(loop, _Pump(loop))
    except NotImplementedError:  # e.g. the proactor loop of Windows
        return _ThreadReader(submit)
    return pump.submit(loop, submit, light=light)


_pumps: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""What each loop has: an event loop's _Pump, a trio token's _TrioPump."""

_inherited: list[Any] = []


def _after_fork() -> None:
    """A child never touches what belongs to its parent's loops, not even to free it."""
    _inherited.append(dict(_pumps))
    _pumps.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# asyncio ------------------------------------------------------------------------------------------


class _Pump:
    """One event loop's streams: submits them from its pool of threads, wakes who waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.notifier = _core.Notifier()
        self.readers: dict[int, _LoopReader] = {}
        self._keys = itertools.count()
        self._light: deque[tuple[_LoopReader, Submit]] = deque()
        self._ready: dict[int, None] = {}  # in order of arrival
        self._turning = False
        self._inbox: deque[tuple[_LoopReader, Submit]] = deque()
        self._lock = threading.Lock()
        self._submitters = 0
        loop.add_reader(self.notifier.fileno(), self._wake)

    def submit(
        self, loop: asyncio.AbstractEventLoop, submit: Submit, *, light: bool
    ) -> _LoopReader:
        key = next(self._keys)
        reader = self.readers[key] = _LoopReader(self, key)
        if light:
            self._light.append((reader, submit))
            self._turn_soon(loop)
            return reader
        with self._lock:
            self._inbox.append((reader, submit))
            one_more = self._submitters < SUBMITTERS
            self._submitters += one_more
        if one_more:
            try:
                loop.run_in_executor(None, self._serve, loop)
            except BaseException:
                with self._lock:
                    self._submitters -= 1
                reader.close()
                raise
        return reader

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread of the loop's pool: submit until nothing is left."""
        while True:
            with self._lock:
                if not self._inbox:
                    self._submitters -= 1
                    return
                reader, submit = self._inbox.popleft()
            if not reader.begin(submit):
                with contextlib.suppress(RuntimeError):  # of a loop that has been closed
                    loop.call_soon_threadsafe(reader.wake)

    def _wake(self) -> None:
        self._ready.update(dict.fromkeys(self.notifier.drain()))
        if not self._turning:
            self._turn()

    def _turn_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn)

    def _turn(self) -> None:
        import asyncio

        self._turning = False
        for key in list(itertools.islice(self._ready, WOKEN)):
            del self._ready[key]
            reader = self.readers.get(key)
            if reader is not None:
                reader.wake()
        end = time.perf_counter() + TURN
        while self._light and time.perf_counter() < end:
            reader, submit = self._light.popleft()
            if not reader.begin(submit):
                reader.wake()
        if self._ready or self._light:
            # The loop is not kept: it would keep itself, by its pump.
            self._turn_soon(asyncio.get_running_loop())


class _LoopReader:
    """A stream that the loop's thread reads, whichever began it."""

    __slots__ = ("_failed", "_key", "_left", "_pump", "_stream", "_waiter")

    def __init__(self, pump: _Pump, key: int) -> None:
        self._pump = pump
        self._key = key
        self._stream: _core.Stream | None = None
        self._failed: BaseException | None = None
        self._left = False
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> _core.Delta | None:
        import asyncio

        while True:
            if self._failed is not None:
                self._raise()
            if self._stream is not None:
                try:
                    delta = self._stream.try_next()
                except StopIteration:
                    return None
                if delta is not None:
                    return delta
            # Nothing is lost here: only this thread calls `wake`, and not before it waits.
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def wake(self) -> None:
        """On the loop's thread: there is something to read."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def begin(self, submit: Submit) -> bool:
        """Submit, on any thread. False: that raised, and nothing but `wake` will tell."""
        if self._left:
            return True
        try:
            stream = self._stream = submit()
            stream.subscribe(self._pump.notifier, self._key)
        except BaseException as error:
            self._failed = error
            return False
        if self._left:  # while it was being submitted
            stream.close()
        return True

    def close(self) -> None:
        self._left = True
        self._pump.readers.pop(self._key, None)
        if self._stream is not None:
            self._stream.close()

    def _raise(self) -> None:
        """Raise what submitting raised, and let go of it: it holds this frame."""
        try:
            if self._failed is not None:
                raise self._failed
        finally:
            self._failed = None


class _ThreadReader:
    """A stream on a loop that cannot watch a descriptor: each wait is in its pool of threads."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._stream: _core.Stream | None = None

    async def next(self) -> _core.Delta | None:
        import asyncio

        if self._stream is None:
            self._stream = await asyncio.to_thread(self._submit)
        return await asyncio.to_thread(next, self._stream, None)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


# trio ---------------------------------------------------------------------------------------------


class _TrioPump:
    """The same for a run of trio: a task of the system's watches the descriptor."""

    def __init__(self) -> None:
        self.notifier = _core.Notifier()
        self.waiting: dict[int, trio.Event] = {}
        self.keys = itertools.count()

    async def run(self) -> None:
        """Until the run of trio ends."""
        import trio

        while True:
            await trio.lowlevel.wait_readable(self.notifier.fileno())
            for key in self.notifier.drain():
                event = self.waiting.pop(key, None)
                if event is not None:
                    event.set()


def _trio_pump() -> _TrioPump:
    import trio

    token = trio.lowlevel.current_trio_token()
    pump: _TrioPump | None = _pumps.get(token)
    if pump is None:
        pump = _pumps[token] = _TrioPump()
        trio.lowlevel.spawn_system_task(pump.run)
    return pump


class _TrioReader:
    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._pump = _trio_pump()
        self._key = next(self._pump.keys)
        self._stream: _core.Stream | None = None

    async def next(self) -> _core.Delta | None:
        import trio

        if self._stream is None:
            self._stream = await trio.to_thread.run_sync(self._submit)
            self._stream.subscribe(self._pump.notifier, self._key)
        while True:
            await trio.lowlevel.checkpoint()
            try:
                delta = self._stream.try_next()
            except StopIteration:
                return None
            if delta is not None:
                return delta
            event = self._pump.waiting[self._key] = trio.Event()
            await event.wait()

    def close(self) -> None:
        self._pump.waiting.pop(self._key, None)
        if self._stream is not None:
            self._stream.close()
