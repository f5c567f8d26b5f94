"""This process: its memory use, and the signals that ask it to stop."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def stop_signals() -> list[int]:
    """Return the signals that ask for an orderly stop: SIGINT, SIGTERM, and SIGHUP unless ignored (as under nohup)."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    return numbers


def handle_signal(number: int, handler: Any) -> Any:
    """Set a signal's handler and return the previous one.

    None stands for a handler that was not set from Python; it cannot be restored, so passing None changes nothing.
    """
    return signal.getsignal(number) if handler is None else signal.signal(number, handler)


@contextlib.contextmanager
def handling(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """Context in which these signals call `handler`; does nothing outside of the main thread."""
    main = threading.current_thread() is threading.main_thread()
    earlier = {number: handle_signal(number, handler) for number in (numbers if main else ())}
    try:
        yield
    finally:
        for number, before in earlier.items():
            handle_signal(number, before)


def resident_bytes() -> int | None:
    """Return the resident memory of this process in bytes (its peak if the system only reports that);
    None if unknown.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return highest_bytes()
    import resource

    return pages * resource.getpagesize()


def peak_bytes() -> int | None:
    """Return the peak resident memory of this process in bytes, since `forget_peak` if that was called; None if
    unknown.

    It does not use getrusage, whose peak a process inherits from its parent.
    """
    return _status("VmHWM")


def anonymous_bytes() -> int | None:
    """Return the resident memory in bytes that does not belong to files, so that it must fit into RAM;
    None if unknown.
    """
    return _status("RssAnon")


def _status(name: str) -> int | None:
    """Return a field of /proc/self/status in bytes; None if it is not available."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError):
        return None


def forget_peak() -> bool:
    """Reset the peak that `peak_bytes` reports; return False where the system cannot (Linux can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def highest_bytes() -> int | None:
    """Return the peak memory by getrusage in bytes, which may be inherited from the parent process;
    None if unavailable.
    """
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
