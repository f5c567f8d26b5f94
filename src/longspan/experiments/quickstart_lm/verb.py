"""The command: the steps in order, the checks, and the page."""

from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.outputs import check_output_folder
from longspan.experiments import tour

RECIPE = "quickstart-lm.toml"


def quickstart_lm(
    output: tour.OutputOption = Path("out/quickstart-lm"),
    text: Annotated[
        str, typer.Option("--text", metavar="FILE", help="The long text to stream: kjv, or a file.")
    ] = "kjv",
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", metavar="FILE", help="The recipe to train; a transformer_xl.", show_default=f"recipes/{RECIPE}"
        ),
    ] = None,
    set_: tour.AssignmentsOption = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="NAME", help="Device for every step: auto (CUDA if available), cpu, cuda, ..."
        ),
    ] = "",
    reuse: tour.ReuseOption = False,
) -> int:
    """Stream a book in constant memory and write an HTML report; about seven minutes.

    Trains a byte-level Transformer-XL on 200 years of State of the Union addresses for three minutes. Streams the
    whole King James Bible, which is not in its training text, in constant memory; halfway the state is saved and a new
    process continues from it. Compares longer and shorter memories on held-out speeches, and continues one of them.
    Checks its own claims and exits with status 1 if one fails; times are only reported, because other programs affect
    them.

    Examples:
      longspan quickstart-lm
      longspan quickstart-lm --text war-and-peace.txt --set train.minutes=10 -o out/longer
    """
    check_output_folder(output, "--output")
    from longspan.config import override, read_toml
    from longspan.experiments.quickstart_lm import checks, page, steps
    from longspan.experiments.quickstart_lm.plan import make_plan
    from longspan.experiments.training_table import TrainingTable
    from longspan.train import find_recipe
    from longspan.train.distributed import choose_device

    data = read_toml(recipe or find_recipe(RECIPE))
    for assignment in set_ or []:
        data = override(data, assignment)
    if device:
        choose_device(device, what="--device")
        data = override(data, f"train.device={device}")
    clock = tour.Clock()
    plan = make_plan(data, output, text)
    tour.say_step(1, 4, "using the model of an earlier run" if reuse else f"training {plan.describe_training()}")
    tour.train_or_reuse(plan.recipe, plan.run, reuse=reuse, display=TrainingTable())
    clock.lap("train")
    tour.say_step(2, 4, "comparing lengths of the memory on held-out speeches")
    memory = steps.compare_memories(plan)
    clock.lap("memory")
    tour.say_step(3, 4, f"streaming {plan.text_name}, {plan.size:,} bytes as one document, in two processes")
    streamed = steps.stream(plan)
    clock.lap("stream")
    tour.say_step(4, 4, "continuing a held-out speech")
    written = steps.write_on(plan)
    clock.lap("write")
    verdicts = checks.check(plan, memory, streamed, clock)
    path = page.write(plan, verdicts, memory, streamed, written, clock)
    return tour.finish(verdicts, path)
