"""Options that verbs share, and verbs whose options are a dataclass."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from longspan.cli.outputs import check_output_file, check_output_folder
from longspan.errors import ConfigError

Options = TypeVar("Options")


def verb(options: type[Options]) -> Callable[[Callable[[Options], Any]], Callable[..., Any]]:
    """Make a verb of a function of its options, a dataclass: typer sees a parameter for each field."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
    ]

    def decorate(function: Callable[[Options], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(**values: Any) -> Any:
            return function(options(**values))

        call.__annotations__ = hints
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate


def _check_errors(errors: str) -> str:
    if errors not in ("strict", "replace"):
        raise ConfigError(f"--errors {errors!r}: strict or replace")
    return errors


def check_page(folder: Path) -> Path:
    """The folder of `--output`; raises as `check_output_folder`."""
    return check_output_folder(folder, "--output")


def check_state(path: Path | None) -> Path | None:
    """The file of `--save-state`, which can be written. Raises CheckpointError: it cannot."""
    return None if path is None else check_output_file(path, "--save-state")


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Change a field of the model that holds no weights, such as model.mixers.0.mem_len=1024. Repeatable.",
        show_default=False,
    ),
]
ErrorsOption = Annotated[
    str,
    typer.Option(
        "--errors",
        metavar="strict|replace",
        help="Of bytes that are not UTF-8, where a run reads subwords or words: stop there, or read U+FFFD in their "
        "place.",
        callback=_check_errors,
    ),
]
PageOption = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Where the page and the figures go.", callback=check_page),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="auto (CUDA where there is one), cpu, cuda, cuda:1 or another."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Of the weights: float32, bfloat16, float16, float64.",
        show_default="as they are stored",
    ),
]
