"""`longspan train`."""

import functools
import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.console import console, print_command, say
from longspan.cli.options import TrackOption
from longspan.cli.outputs import check_output_folder
from longspan.errors import ConfigError


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A TOML file with the tables model, task and train (or transfer alone), or a name listed by "
            "`longspan recipes`.",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Override a field of the recipe. Repeatable.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder of the run.", show_default="runs/<name of the recipe>"
        ),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            "--init",
            metavar="START",
            help="Take the weights that fit from speeches or code (trained models of the package), a run or a saved "
            "model. Short for --set train.init=START.",
            show_default=False,
        ),
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Short for --set train.device=NAME.", show_default=False)
    ] = "",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="Short for --set train.dtype=TYPE.", show_default=False)
    ] = "",
    track: TrackOption = "",
) -> int:
    """Train a model from a recipe.

    Writes the model, its tokenizer, checkpoints and a log to the folder of the run. Ctrl-C finishes the current step,
    saves and exits; --resume continues with identical results. For several GPUs or processes, start it with torchrun.
    A recipe with a table transfer is an attention transfer: see `longspan transfer`.

    Examples:
      longspan train tiny
      longspan train quickstart-lm --set train.minutes=20 --set model.dim=256 -o runs/larger
      longspan train --resume -o runs/larger
      longspan train lm/infini --init speeches -o runs/infini
    """
    if recipe is None and not (resume and output):
        raise ConfigError(
            "RECIPE is missing: give `longspan train RECIPE`, or `longspan train --resume -o DIR` to continue a run"
        )
    from longspan.train.transfer_store import is_transfer

    folder = check_output_folder(output or Path("runs") / (Path(recipe).stem if recipe else ""), "--output")
    data, name = _recipe(recipe, set_ or []), shlex.quote(str(folder))
    if is_transfer(data, folder, resume=resume):
        if init:
            raise ConfigError("--init: a transfer starts from transfer.model; leave --init out")
        return _transfer(_with_fields(data, "transfer", device=device, dtype=dtype), folder, resume, track)
    data = _with_fields(data, "train", device=device, dtype=dtype, init=init)
    outcome = _run(recipe, data, folder, resume, track)
    if int(os.environ.get("RANK", "0")) != 0:
        return 0
    if outcome.interrupted:
        say(f"continue with: longspan train --resume -o {name}")
        return 130
    _print_result(outcome, name)
    return 0


def _recipe(recipe: str | None, assignments: list[str]) -> dict[str, Any]:
    """Read a recipe (None: an empty one) and apply overrides."""
    from longspan.config import override, read_toml
    from longspan.train import locate_recipe

    return functools.reduce(override, assignments, {} if recipe is None else read_toml(locate_recipe(recipe)))


def _with_fields(data: dict[str, Any], table: str, **values: str) -> dict[str, Any]:
    """Return a recipe with the fields of a table that options set; empty ones are left out."""
    from longspan.config import override

    assignments = [f"{table}.{name}={json.dumps(text, ensure_ascii=False)}" for name, text in values.items() if text]
    return functools.reduce(override, assignments, data)


def _transfer(data: dict[str, Any], folder: Path, resume: bool, track: str) -> int:
    """Run the attention transfer of a recipe, and print its report as `longspan transfer` does."""
    from longspan.cli.transfer import print_outcome
    from longspan.train.transfer_recipe import train_transfer

    outcome = train_transfer(data, folder, resume=resume, track=track)
    return print_outcome(outcome, folder, f"continue with: longspan train --resume -o {shlex.quote(str(folder))}")


def _run(recipe: str | None, data: dict[str, Any], folder: Path, resume: bool, track: str) -> Any:
    """Train the model of a recipe, and return the `Result` of the run."""
    from longspan.train import run

    missing = [name for name in ("model", "task") if recipe is not None and not resume and not data.get(name)]
    if missing:
        raise ConfigError(
            f"{recipe}: the table [{missing[0]}] is missing or empty; add it, as in `longspan recipes --show tiny`"
        )
    return run(data, folder, resume=resume, track=track)


def _print_result(outcome: Any, name: str) -> None:
    """Print the steps, the final figures and the next commands for a finished run; `name` is its quoted folder."""
    from longspan.files import read_json

    figures = "  ".join(
        f"{key.replace('_', ' ')} {value:.4f}" if isinstance(value, float) else f"{key} {value:,}"
        for key, value in (outcome.evaluation or {}).items()
    )
    out = console()
    out.print(
        f"{name}: {outcome.step:,} steps, {outcome.tokens:,} tokens in {outcome.seconds / 60:.1f} min", markup=False
    )
    if figures:
        out.print(f"held-out: {figures}", markup=False)
    kind = read_json(outcome.folder / "recipe.json")["task"]["name"]
    next_commands = {
        "memory": f"longspan eval {name} --segments 1,16,256",
        "text": f"longspan eval {name} | longspan stream {name} FILE | longspan generate {name}",
    }
    print_command(f"next: {next_commands.get(kind, f'longspan eval {name}')}")
