"""Opens runs for the verbs, and prints what is noteworthy about them on standard error."""

from typing import TYPE_CHECKING, Any

from longspan.cli.console import say

if TYPE_CHECKING:
    from longspan.models import Decoder
    from longspan.tasks import Task, TextTask


def open_run(*arguments: Any, **options: Any) -> "tuple[Decoder, TextTask]":
    """The model and the task of a run that reads text; arguments as of `longspan.train.open_run`."""
    return open_any_run(*arguments, text=True, **options)  # type: ignore[return-value]


def open_any_run(*arguments: Any, **options: Any) -> "tuple[Any, Task]":
    """The same of a run of any task."""
    from longspan.train import open_run

    opened = open_run(*arguments, **options)
    for note in opened.notes:
        say(note)
    return opened.model, opened.task
