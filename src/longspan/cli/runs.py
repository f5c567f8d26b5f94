"""Opens runs for commands and prints notes about them on standard error."""

from typing import TYPE_CHECKING, Any

from longspan.cli.console import say

if TYPE_CHECKING:
    from longspan.models import Decoder
    from longspan.tasks import Task, TextTask


def open_run(*arguments: Any, **options: Any) -> "tuple[Decoder, TextTask]":
    """Open a run that reads text: return its model and task.

    Arguments are those of `longspan.train.open_run`, which raises CheckpointError for a run of another task.
    """
    return open_any_run(*arguments, text=True, **options)  # type: ignore[return-value]


def open_any_run(*arguments: Any, **options: Any) -> "tuple[Any, Task]":
    """Open a run of any task: return its model and task; arguments are those of `longspan.train.open_run`."""

    from longspan.train import open_run

    opened = open_run(*arguments, **options)
    for note in opened.notes:
        say(note)
    return opened.model, opened.task
