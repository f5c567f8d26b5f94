"""Stops a training at the end of a step on Ctrl-C, on SIGTERM, and when the terminal is closed."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from longspan.process import handle_signal, stop_signals


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first SIGINT, SIGTERM or SIGHUP while the context is open; a second one has its usual effect.

    Without effect outside the main thread. A SIGHUP that is ignored (nohup) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier: dict[int, Any] = {}

    def restore() -> None:
        """Set the earlier signal handlers again."""
        for number, handler in earlier.items():
            handle_signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        """Handle the first signal: call `stop`, and set the earlier handlers again for a second one."""
        stop()
        restore()

    for number in stop_signals():
        earlier[number] = handle_signal(number, handle)
    try:
        yield
    finally:
        restore()
