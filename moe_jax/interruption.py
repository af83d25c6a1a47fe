"""SIGINT and SIGTERM: a program that one of them ends says so by its status, and loses nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from moe_jax.processes import announce_stop, on_stop, stop_together

# What a shell reports for a program that the signal ended: 130 and 143.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# Python sees a signal only when native code returns, and a compilation may take minutes: after so
# many seconds of a signal that nobody took notice of, the program ends. Every file of ours appears
# whole or not at all, so that it may.
_PATIENCE = 3.0
_STOPPED = "stopped; run it again to go on"
_ENDS: dict[int, tuple[str, int]] = {
    signal.SIGINT: ("interrupted", INTERRUPTED),
    signal.SIGTERM: (_STOPPED, TERMINATED),
}


class Stopped(SystemExit):
    """A program that SIGTERM asked to stop, and that goes on when it is started again."""

    def __init__(self, message: str = _STOPPED) -> None:
        super().__init__(TERMINATED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interruption:
    """While entered, SIGTERM sets ``requested`` instead of ending the process.

    Whoever stops because of it sets ``obeyed``; otherwise the signal is sent again on leaving.
    Outside of the main thread, where Python delivers no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self.obeyed = False

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if not hasattr(self, "_before"):
            return
        signal.signal(signal.SIGTERM, self._before)
        if self.requested and not self.obeyed and kind is None:
            # It came too late to stop what was entered: it is for what follows.
            signal.raise_signal(signal.SIGTERM)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """While entered, SIGINT and SIGTERM end the program, with a line and a status of their own.

    Blocks are left as for any exception, so that a checkpoint which is being written gets whole.
    Exit handlers are not run: libraries free what a compilation, still under way in a thread of
    theirs, goes on using, and the program would end in a segmentation fault.

    SIGTERM to one of many processes is one to all of them.
    """
    noticed = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        noticed.set()
        raise KeyboardInterrupt

    def terminate(number: int, frame: FrameType | None) -> None:
        if not noticed.is_set():  # else it is ending already
            noticed.set()
            raise Stopped

    def again(lost: Any) -> None:
        # Python drops what is raised in a callback of the garbage collector, say.
        kinds = {KeyboardInterrupt: signal.SIGINT, Stopped: signal.SIGTERM}
        if lost.exc_type not in kinds:
            return hook(lost)
        noticed.clear()
        threading.Timer(0.1, os.kill, (os.getpid(), kinds[lost.exc_type])).start()

    hook, sys.unraisablehook = sys.unraisablehook, again
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    try:
        with (
            _watched(noticed, interrupt, terminate),
            on_stop(lambda: os.kill(os.getpid(), signal.SIGTERM)),
        ):
            yield
    except KeyboardInterrupt:
        leave(*_ENDS[signal.SIGINT])
    except Stopped as stopped:
        noticed.set()
        leave(str(stopped), TERMINATED)
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched(noticed: threading.Event, *handlers: object) -> Iterator[None]:
    """A thread ends the program where the main one does not get to notice a signal.

    One that an ``Interruption`` handles has time: whoever entered that stops when a step ends.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM:
                announce_stop()
            if signal.getsignal(number[0]) in handlers and not noticed.wait(_PATIENCE):
                leave(*_ENDS[number[0]])
        os.close(read_end)

    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_end)  # which ends the thread


def leave(message: str, status: int) -> NoReturn:
    """Ends the program at once, with everything flushed; many processes end together."""
    print(message, file=sys.stderr, flush=True)
    logging.shutdown()
    # All are told to stop, or find the same error; where one is lost, it is not waited for long.
    stop_together(10 if status == TERMINATED else 2)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            stream.flush()
    os._exit(status)
