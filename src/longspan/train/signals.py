"""An orderly end on Ctrl-C and SIGTERM."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM; a second one does what it always did. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        earlier[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
