"""When a run is asked to stop, or it is time to save: a question that all processes answer alike."""

import signal
import threading
from time import monotonic
from types import FrameType
from typing import Literal

import torch
from accelerate import Accelerator

ASK_EVERY = 10  # calls between two rounds of asking, where there is more than one process


class Stopped(Exception):
    """A run has saved what it had and ends, as it was asked to.

    Attributes:
        status: what the process ends with, as shells count it: 128 and the signal's number.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Interruption:
    """Turns SIGTERM and the first SIGINT into a wish that the loop grants between two steps, while it is entered.

    A second SIGINT interrupts at once. Processes may be told at different times, or only one of them is; so they ask
    each other now and then, and all stop, or save, after the same step.

    Args:
        accelerator: whose processes have to agree.
        save_minutes: between two saves within an epoch; None: there is none.
    """

    def __init__(self, accelerator: Accelerator, save_minutes: float | None):
        self.accelerator = accelerator
        self.save_seconds = 60 * save_minutes if save_minutes is not None else float("inf")
        self.saved = monotonic()
        self.signal: signal.Signals | None = None
        self._calls = 0
        self._handlers: dict[signal.Signals, signal.Handlers] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # no other may
            self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def due(self) -> Literal["save", "stop"] | None:
        """What is to be done after the present step; to be asked by every process after every step."""
        wish = 2 if self.signal else int(monotonic() - self.saved >= self.save_seconds)
        if self.accelerator.num_processes > 1:
            self._calls += 1
            if self._calls % ASK_EVERY:
                return None
            asked = torch.tensor(wish, device=self.accelerator.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            wish = int(asked)
        if wish:
            self.saved = monotonic()
        return (None, "save", "stop")[wish]

    def stop(self, message: str) -> None:
        """Raises `Stopped` for the signal that came; on the processes that none came to, for SIGTERM."""
        number = self.signal or signal.SIGTERM
        raise Stopped(f"stopped by {number.name}: {message}", 128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
