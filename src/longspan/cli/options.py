"""Options that several commands share, and a decorator for commands whose options are a dataclass."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from longspan.cli.outputs import check_output_file, check_output_folder
from longspan.errors import ConfigError

Options = TypeVar("Options")


def verb(options: type[Options]) -> Callable[[Callable[[Options], Any]], Callable[..., Any]]:
    """Return a decorator that turns `function(options)` into a command with one typer parameter per dataclass field."""
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
        """Return a command that collects its keyword arguments in an `options` object and calls `function` with it."""

        @functools.wraps(function)
        def call(**values: Any) -> Any:
            """Call the function with an options object made from the parsed values of the command line."""
            return function(options(**values))

        call.__annotations__ = hints
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate


def _check_errors(errors: str) -> str:
    """Return the value of `--errors`, or raise ConfigError if it is unknown."""
    if errors not in ("strict", "replace"):
        raise ConfigError(f"--errors {errors!r}: must be strict or replace")
    return errors


def check_page(folder: Path) -> Path:
    """Return the folder of `--output`; raises CheckpointError if it cannot be written."""
    return check_output_folder(folder, "--output")


def check_state(path: Path | None) -> Path | None:
    """Return the file of `--save-state`, or None; raises CheckpointError if it cannot be written."""
    return None if path is None else check_output_file(path, "--save-state")


RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Folder written by `longspan train` or `longspan convert`.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Change a field of the model that does not affect its weights, such as model.mixers.0.mem_len=1024. "
        "Repeatable.",
        show_default=False,
    ),
]
ErrorsOption = Annotated[
    str,
    typer.Option(
        "--errors",
        metavar="strict|replace",
        help="What to do with invalid UTF-8, if the run reads subwords or words: stop with an error, or read U+FFFD.",
        callback=_check_errors,
    ),
]
PageOption = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write the HTML report to.", callback=check_page),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="auto (CUDA if available, else the CPU), or a torch device: cpu, cuda:1, ..."
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="dtype of the weights: float32, bfloat16, float16 or float64.",
        show_default="as stored",
    ),
]
TrackOption = Annotated[
    str,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Send the lines of the log to a tracker as well: tensorboard, trackio, wandb or mlflow.",
        show_default=False,
    ),
]
GgufOption = Annotated[
    str | None,
    typer.Option("--gguf", metavar="FILE", help="Name of the GGUF file to read, if MODEL contains several."),
]


def layer_ranges(layers: str) -> tuple[int, ...] | str | None:
    """Parse `--layers`: numbers and ranges such as `0-4,9,-1`, `auto:N` itself, or None for `all`; raises
    ConfigError.
    """
    if layers == "all":
        return None
    if re.fullmatch(r"auto:[1-9]\d*", layers):
        return layers
    numbers: list[int] = []
    try:
        for part in layers.split(","):
            first, dash, last = part.strip().partition("-")
            numbers += range(int(first), int(last) + 1) if dash and first else [int(part)]
    except ValueError:
        raise ConfigError(
            f"--layers {layers!r}: expected whole numbers and ranges, for example 0-4,9,-1, or auto:N"
        ) from None
    return tuple(numbers)
