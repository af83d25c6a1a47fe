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

    Outside of the main thread, where Python delivers no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        if hasattr(self, "_before"):
            signal.signal(signal.SIGTERM, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
