"""This process: how much memory it holds, and the signals that ask it to end."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def stop_signals() -> list[int]:
    """Signals that ask for an orderly end: SIGINT, SIGTERM, and SIGHUP unless it is ignored, as nohup has it."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    return numbers


def handle_signal(number: int, handler: Any) -> Any:
    """Set a signal's handler, and return the earlier one; None stands for one that Python did not set, which stays."""
    return signal.getsignal(number) if handler is None else signal.signal(number, handler)


@contextlib.contextmanager
def handling(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """Inside, these signals call `handler`; nothing changes outside of the main thread."""
    main = threading.current_thread() is threading.main_thread()
    earlier = {number: handle_signal(number, handler) for number in (numbers if main else ())}
    try:
        yield
    finally:
        for number, before in earlier.items():
            handle_signal(number, before)


def resident_bytes() -> int | None:
    """Memory this process holds now (its peak where the system does not say); None where neither is known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return highest_bytes()
    import resource

    return pages * resource.getpagesize()


def peak_bytes() -> int | None:
    """The most memory this process has held, since `forget_peak` where that was called; None where it is not known.

    Not getrusage, whose figure a process inherits from the one that started it.
    """
    return _status("VmHWM")


def anonymous_bytes() -> int | None:
    """Memory this process holds now that is no file's, so that it must fit into RAM; None where it is not known."""
    return _status("RssAnon")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError):
        return None


def forget_peak() -> bool:
    """Let the peak count from here; False where the system cannot (Linux can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def highest_bytes() -> int | None:
    """The most memory this process, or one that started it, has held, by getrusage; None where there is none."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
