"""The verb: train, ask at every length, check, and draw the page."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from longspan.cli.outputs import check_output_folder
from longspan.errors import CheckpointError, ConfigError
from longspan.experiments.tour import Clock, finish, say_step

if TYPE_CHECKING:
    from longspan.tasks import MemoryTask

RECIPE = "rmt.toml"


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the run, the figures and the page go.")
    ] = Path("out/quickstart"),
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="What is trained.", show_default=f"recipes/{RECIPE}")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Override a field of the recipe. Repeatable.", show_default=False),
    ] = None,
    longest: Annotated[int, typer.Option("--longest", min=1, help="Ask after at most so many segments.")] = 4096,
    count: Annotated[
        int,
        typer.Option("--count", min=1, help="Questions of each kind at short lengths; fewer are asked at long ones."),
    ] = 64,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Of training and asking; auto is CUDA where there is one.")
    ] = "cpu",
    reuse: Annotated[bool, typer.Option("--reuse", help="Keep the model that is in DIR already.")] = False,
) -> int:
    """Tell a model a fact once, let two million tokens go by, and ask for it; about ten minutes.

    Trains a Recurrent Memory Transformer on at most five segments of 499 tokens: who went where, told somewhere in
    State of the Union addresses. Then asks after 1, 4, 16 ... 4,096 segments of text it has never seen, 2,043,904
    tokens, read one by one in constant memory. Checks its own claims, and ends with exit code 1 where one fails;
    clocks are reported only, as other programs disturb them.

    Examples:
      longspan quickstart
      longspan quickstart --set task.kind=reasoning --set train.minutes=20 -o out/reasoning
      longspan quickstart --reuse --longest 256
    """
    check_output_folder(output, "--output")
    from longspan.config import override, read_toml
    from longspan.experiments.quickstart import measure, page
    from longspan.experiments.training_table import RECALL, TrainingTable
    from longspan.train import find_recipe, load_run, run
    from longspan.train.distributed import choose_device

    data = read_toml(recipe or find_recipe(RECIPE))
    for assignment in set_ or []:
        data = override(data, assignment)
    where = choose_device(device, what="--device")
    if device != "cpu":
        data = override(data, f"train.device={device}")
    if data.get("task", {}).get("name") != "memory" or "classes" not in data.get("model", {}):
        raise ConfigError("quickstart: wants a recipe of the memory task with model.classes; use `longspan train`")
    clock, folder = Clock(), output / "run"
    if reuse:
        say_step(1, 3, "keeping the model that is there")
        if not (folder / "model").is_dir():
            raise CheckpointError(f"{folder}: no trained model to keep; leave --reuse out")
    else:
        say_step(1, 3, "training: a fact somewhere in a few segments of real text, then a question")
        if folder.exists():
            if not (folder / "recipe.json").exists() and any(folder.iterdir()):
                raise CheckpointError(f"{folder}: holds something that is not a run; choose another --output")
            shutil.rmtree(folder)
        if run(data, folder, progress=TrainingTable(RECALL)).interrupted:
            raise KeyboardInterrupt
    clock.lap("train")
    model, task = cast("tuple[Any, MemoryTask]", load_run(folder))
    model.to(where)
    say_step(2, 3, "asking, after more and more text it has never seen (k of n right)")
    readings = measure.ask(model, task, measure.plan(longest, count))
    clock.lap("ask")
    say_step(3, 3, "checking and drawing")
    checks = measure.check(readings, clock)
    path = page.write(output, folder, model, task, readings, checks, clock)
    return finish(checks, path)
