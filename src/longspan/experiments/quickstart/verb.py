"""The command: train, ask at every length, check, and write the page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from longspan.cli.outputs import check_output_folder
from longspan.errors import ConfigError
from longspan.experiments import tour

if TYPE_CHECKING:
    from longspan.tasks import MemoryTask

RECIPE = "rmt.toml"


def quickstart(
    output: tour.OutputOption = Path("out/quickstart"),
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="The recipe to train.", show_default=f"recipes/{RECIPE}"),
    ] = None,
    set_: tour.AssignmentsOption = None,
    longest: Annotated[
        int, typer.Option("--longest", min=1, help="Largest number of segments before a question.")
    ] = 4096,
    count: Annotated[
        int, typer.Option("--count", min=1, help="Questions of each kind at short lengths; long ones get fewer.")
    ] = 64,
    device: Annotated[
        str,
        typer.Option("--device", metavar="NAME", help="Device for training and evaluation; auto is CUDA if available."),
    ] = "cpu",
    reuse: tour.ReuseOption = False,
) -> int:
    """Recall a fact after 2M tokens and write an HTML report; about ten minutes.

    Trains a Recurrent Memory Transformer on at most five segments of 499 tokens: State of the Union addresses with a
    sentence somewhere about who went where. Then asks about it after 1, 4, 16 ... 4,096 segments of unseen text,
    2,043,904 tokens, read in constant memory. Checks its own claims and exits with status 1 if one fails; times are
    only reported, because other programs affect them.

    Examples:
      longspan quickstart
      longspan quickstart --set task.kind=reasoning --set train.minutes=20 -o out/reasoning
      longspan quickstart --reuse --longest 256
    """
    check_output_folder(output, "--output")
    from longspan.config import override, read_toml
    from longspan.experiments.quickstart import measure, page
    from longspan.experiments.training_table import RECALL, TrainingTable
    from longspan.train import find_recipe, load_run
    from longspan.train.distributed import choose_device

    data = read_toml(recipe or find_recipe(RECIPE))
    for assignment in set_ or []:
        data = override(data, assignment)
    where = choose_device(device, what="--device")
    if device != "cpu":
        data = override(data, f"train.device={device}")
    if data.get("task", {}).get("name") != "memory" or "classes" not in data.get("model", {}):
        raise ConfigError(
            "quickstart: the recipe must have the memory task and model.classes; `longspan train` takes any recipe"
        )
    clock, folder = tour.Clock(), output / "run"
    training = "training: a fact somewhere in a few segments of real text, then a question"
    tour.say_step(1, 3, "using the model of an earlier run" if reuse else training)
    tour.train_or_reuse(data, folder, reuse=reuse, display=TrainingTable(RECALL))
    clock.lap("train")
    model, task = cast("tuple[Any, MemoryTask]", load_run(folder))
    model.to(where)
    tour.say_step(2, 3, "asking after longer and longer unseen texts (k of n correct)")
    readings = measure.ask(model, task, measure.plan(longest, count))
    clock.lap("ask")
    tour.say_step(3, 3, "checking and writing the page")
    checks = measure.check(readings, clock)
    path = page.write(output, folder, model, task, readings, checks, clock)
    return tour.finish(checks, path)
