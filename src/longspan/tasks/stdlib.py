"""Python source: the standard library of the running interpreter, one document per package.

Code repeats names over thousands of bytes, which speeches do not: here long context pays. The text differs between
versions of Python, so figures are comparable within one version only.
"""

import functools
import sys
import sysconfig
from pathlib import Path

import numpy as np

from longspan.errors import DataError
from longspan.tasks.base import Array

_LEFT_OUT = frozenset({"test", "tests", "idle_test", "_bundled", "__pycache__", "site-packages", "dist-packages"})
"""folders of tests, of bundled wheels and of packages that are not part of Python"""


def packages() -> dict[str, list[Path]]:
    """Return the source files of every package or single module of the standard library, sorted, without tests.

    Only what every platform has under the same name counts (`sys.stdlib_module_names`), so configuration that was
    generated for this machine is left out.

    Raises:
        DataError: the interpreter has no source files of its library.
    """
    return dict(_packages_of(Path(sysconfig.get_path("stdlib"))))


@functools.cache
def _packages_of(folder: Path) -> dict[str, list[Path]]:
    """Return the source files in the folder of a standard library; cached, because listing it takes half a second."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.as_posix()):
        parts = path.relative_to(folder).parts
        name = parts[0].removesuffix(".py")
        if name in sys.stdlib_module_names and not _LEFT_OUT.intersection(parts):
            files.setdefault(name, []).append(path)
    if not files:
        raise DataError(
            f"task.source = 'stdlib': {folder} has no Python files; install the standard library's source, or give a "
            "folder of code and task.pattern = '*.py'"
        )
    return files


def joined(paths: list[Path]) -> Array:
    """Return the files of a package one after another as (bytes,) uint8, under a comment with its path in the library.

    Raises:
        DataError: a file cannot be read.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts = []
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        parts.append(f"# {path.relative_to(folder).as_posix()}\n".encode() + text.rstrip() + b"\n\n")
    return np.frombuffer(b"".join(parts), dtype=np.uint8)
