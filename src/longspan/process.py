"""How much memory this process holds."""

import sys
from pathlib import Path


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
