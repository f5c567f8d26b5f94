"""The verb: the steps in order, the checks, and the page."""

from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.outputs import check_output_folder
from longspan.experiments.tour import Clock, finish, say_step

RECIPE = "quickstart-lm.toml"


def quickstart_lm(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the run, the figures and the page go.")
    ] = Path("out/quickstart-lm"),
    text: Annotated[
        str, typer.Option("--text", metavar="FILE", help="The long text that is streamed: kjv, or a file of your own.")
    ] = "kjv",
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", metavar="FILE", help="What is trained; a transformer_xl.", show_default=f"recipes/{RECIPE}"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Override a field of the recipe. Repeatable.", show_default=False),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", metavar="NAME", help="Of every step; auto (CUDA where there is one), cpu, cuda, ..."),
    ] = "",
    reuse: Annotated[bool, typer.Option("--reuse", help="Keep the model that is in DIR already.")] = False,
) -> int:
    """Read a book in constant memory, in about seven minutes: train, stream, stop halfway, resume, draw a page.

    Trains a byte-level Transformer-XL on 200 years of State of the Union addresses for three minutes. Streams the
    whole King James Bible, which it has never seen, through it in constant memory; halfway the state is saved and a
    fresh process goes on. Compares what longer and shorter memories are worth on speeches that were held back, and
    continues one of them. Checks its own claims, and ends with exit code 1 where one fails; clocks are reported only,
    as other programs disturb them.

    Examples:
      longspan quickstart-lm
      longspan quickstart-lm --text war-and-peace.txt --set train.minutes=10 -o out/longer
    """
    check_output_folder(output, "--output")
    from longspan.config import override, read_toml
    from longspan.experiments.quickstart_lm import checks, page, steps
    from longspan.experiments.quickstart_lm.plan import make_plan
    from longspan.train import find_recipe
    from longspan.train.distributed import choose_device

    data = read_toml(recipe or find_recipe(RECIPE))
    for assignment in set_ or []:
        data = override(data, assignment)
    if device:
        choose_device(device, what="--device")
        data = override(data, f"train.device={device}")
    clock = Clock()
    plan = make_plan(data, output, text, command_text=text)
    say_step(1, 4, f"training {plan.describe_training()}" if not reuse else "keeping the model that is there")
    steps.train(plan, reuse=reuse)
    clock.lap("train")
    say_step(2, 4, "what memory is worth, on speeches that were held back")
    memory = steps.compare_memories(plan)
    clock.lap("memory")
    say_step(3, 4, f"streaming {plan.text_name}, {plan.size:,} bytes as one document, in two processes")
    streamed = steps.stream(plan)
    clock.lap("stream")
    say_step(4, 4, "going on with a speech that was held back")
    written = steps.write_on(plan)
    clock.lap("write")
    verdicts = checks.check(plan, memory, streamed, clock)
    path = page.write(plan, verdicts, memory, streamed, written, clock)
    return finish(verdicts, path)
