"""SIGTERM as a request: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType


class Stopped(SystemExit):
    """A run that was asked to stop, and that goes on when it is started again; exit status 0."""

    def __init__(self, step: int, steps: int, folder: str | Path) -> None:
        super().__init__(0)
        self.message = f"stopped after step {step} of {steps}, saved in {folder}; run it again"

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
