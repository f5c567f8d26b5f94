"""Tasks: sources of documents (`Documents`) to train and evaluate on, each built from a configuration.

To add a task, write one file with a configuration and a class, and add one line to `_TASKS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from longspan.config import from_dict, nearest, to_dict
from longspan.errors import ConfigError
from longspan.tasks.base import Document, Documents, Piece, Split, Task
from longspan.tasks.bytes import ByteTask, MusicConfig, MusicTask, TilesConfig, TilesTask
from longspan.tasks.memory import MemoryConfig, MemoryTask
from longspan.tasks.protein import ProteinConfig, ProteinTask
from longspan.tasks.synthetic import (
    AssociateConfig,
    AssociateTask,
    CopyConfig,
    CopyTask,
    NeedleTask,
    PasskeyConfig,
    PasskeyTask,
)
from longspan.tasks.text import TextConfig, TextTask

__all__ = [
    "ByteTask",
    "Document",
    "Documents",
    "MemoryConfig",
    "MemoryTask",
    "MusicConfig",
    "MusicTask",
    "Piece",
    "ProteinConfig",
    "ProteinTask",
    "Split",
    "Task",
    "TextConfig",
    "TextTask",
    "TilesConfig",
    "TilesTask",
    "build",
    "names",
    "resolve",
]

_TASKS: dict[str, tuple[type[Any], Callable[[Any], Task]]] = {
    "associate": (AssociateConfig, AssociateTask),
    "copy": (CopyConfig, CopyTask),
    "memory": (MemoryConfig, MemoryTask),
    "music": (MusicConfig, MusicTask),
    "needle": (PasskeyConfig, NeedleTask),
    "passkey": (PasskeyConfig, PasskeyTask),
    "protein": (ProteinConfig, ProteinTask),
    "text": (TextConfig, TextTask),
    "tiles": (TilesConfig, TilesTask),
}


def names() -> list[str]:
    """Return the names of all tasks, the values of `[task] name` in a recipe."""
    return sorted(_TASKS)


def config_class(name: str) -> type[Any]:
    """Return the dataclass with the fields of a task."""
    return _TASKS[name][0]


def build(table: Mapping[str, Any]) -> Task:
    """Build the task of a recipe's `[task]` table: its `name` (default `"text"`) and the fields of its configuration.

    Raises:
        ConfigError: the task or a field is unknown; the message suggests the most similar name.
    """
    config, make, _ = _lookup(table)
    return make(config)


def resolve(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `[task]` table with every default filled in; raises ConfigError for an unknown task or field."""
    config, _, name = _lookup(table)
    return {"name": name, **to_dict(config)}


def _lookup(table: Mapping[str, Any]) -> tuple[Any, Callable[[Any], Task], str]:
    """Return the configuration of a `[task]` table, the class of the task, and its name."""
    name = table.get("name", "text")
    if name not in _TASKS:
        raise ConfigError(f"task.name = {name!r}: unknown task{nearest(str(name), _TASKS)}")
    config, make = _TASKS[name]
    fields = {key: value for key, value in table.items() if key != "name"}
    return from_dict(config, fields, "task"), make, name
