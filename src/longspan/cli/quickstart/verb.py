"""The verb: the steps in order, the checks, and the page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.console import console, print_table, say
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.report import Check

RECIPE = "quickstart-lm.toml"


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the run, the figures and the page go.")
    ] = Path("out/quickstart"),
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
    reuse: Annotated[bool, typer.Option("--reuse", help="Keep the model that is in DIR already.")] = False,
) -> int:
    """See the library work, in about seven minutes: train, stream a book, stop halfway, resume, draw a page.

    Trains a byte-level Transformer-XL on 200 years of State of the Union addresses for three minutes. Streams the
    whole King James Bible, which it has never seen, through it in constant memory; halfway the state is saved and a
    fresh process goes on. Compares what longer and shorter memories are worth on speeches that were held back, and
    continues one of them. Checks its own claims, and ends with exit code 1 where one fails; clocks are reported only,
    as other programs disturb them.

    Examples:
      longspan quickstart
      longspan quickstart --text war-and-peace.txt --set train.minutes=10 -o out/longer
    """
    from longspan.cli.quickstart import checks, page, steps
    from longspan.cli.quickstart.plan import Clock, make_plan
    from longspan.config import override, read_toml

    data = read_toml(recipe or find_recipe())
    for assignment in set_ or []:
        data = override(data, assignment)
    clock = Clock()
    plan = make_plan(data, output, text, command_text=text)
    _say_step(1, f"training {plan.describe_training()}" if not reuse else "keeping the model that is there")
    steps.train(plan, reuse=reuse)
    clock.lap("train")
    _say_step(2, "what memory is worth, on speeches that were held back")
    memory = steps.compare_memories(plan)
    clock.lap("memory")
    _say_step(3, f"streaming {plan.text_name}, {plan.size:,} bytes as one document, in two processes")
    streamed = steps.stream(plan)
    clock.lap("stream")
    _say_step(4, "going on with a speech that was held back")
    written = steps.write_on(plan)
    clock.lap("write")
    found = checks.check(plan, memory, streamed, clock)
    path = page.write(plan, found, memory, streamed, written, clock)
    return _finish(found, path)


def find_recipe() -> Path:
    """The recipe that comes with the library: beside the package where it is installed, else in its source tree.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).parents[2]
    for folder in (package / "recipes", package.parents[1] / "recipes", Path("recipes")):
        if (folder / RECIPE).is_file():
            return folder / RECIPE
    raise ConfigError(f"recipes/{RECIPE} did not come with this installation; give --recipe FILE")


def _say_step(number: int, text: str) -> None:
    console().print(f"\n[bold]{number}/4[/bold]  ", end="")
    console().print(text, markup=False)


def _finish(found: "list[Check]", path: Path) -> int:
    from longspan.report import check_table

    print()
    print_table(check_table(found))
    failed = [check.name for check in found if check.fatal and not check.passed]
    print(f"The page, with figures and all numbers: {path}", flush=True)
    if failed:
        say(f"longspan: {len(failed)} check{'s' if len(failed) > 1 else ''} failed: {'; '.join(failed)}")
    return 1 if failed else 0
