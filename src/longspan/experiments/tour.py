"""Code that both quickstarts share: options, training, the facts of a page, and the exit status."""

import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.console import console, print_table, say
from longspan.errors import CheckpointError
from longspan.version import __version__

if TYPE_CHECKING:
    from longspan.experiments.checks import Check
    from longspan.train import Display

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the run, the figures and the page.")
]
AssignmentsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a field of the recipe. Repeatable.", show_default=False),
]
ReuseOption = Annotated[bool, typer.Option("--reuse", help="Skip training and use the model that is already in DIR.")]


def say_step(number: int, count: int, text: str) -> None:
    """Print the heading of a step, such as `2/4  comparing lengths`."""
    console().print(f"\n[bold]{number}/{count}[/bold]  ", end="")
    console().print(text, markup=False)


def train_or_reuse(recipe: Mapping[str, Any], folder: Path, *, reuse: bool, display: "Display") -> None:
    """Train from scratch, replacing an earlier run in the folder; with `reuse`, keep that run instead.

    Raises:
        CheckpointError: the folder contains files that are not a run, or there is no trained model to reuse.
    """
    from longspan.train import run

    if reuse:
        if not (folder / "model").is_dir():
            raise CheckpointError(f"{folder}: no trained model to reuse; leave out --reuse to train one")
        return
    if folder.exists():
        if not (folder / "recipe.json").exists() and any(folder.iterdir()):
            raise CheckpointError(f"{folder}: contains files that are not a training run; choose another --output")
        shutil.rmtree(folder)
    if run(recipe, folder, progress=display).interrupted:
        raise KeyboardInterrupt


def finish(checks: "list[Check]", path: Path) -> int:
    """Print the checks and the path of the page; return the exit status, 1 if a fatal check failed, else 0."""
    from longspan.experiments.checks import check_table

    print()
    print_table(check_table(checks))
    failed = [check.name for check in checks if check.failed]
    print(f"Report with figures and all numbers: {path}", flush=True)
    if failed:
        say(f"longspan: {len(failed)} check{'s' if len(failed) > 1 else ''} failed: {'; '.join(failed)}")
    return 1 if failed else 0


@dataclass
class Clock:
    """Measures the seconds that each step of a quickstart takes."""

    started: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        """Record the seconds since the last lap under `name`."""
        self.laps[name] = self.total - sum(self.laps.values())

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


def machine_facts(seed: int, clock: Clock) -> list[tuple[str, str]]:
    """Return rows of a page's table of facts: seed, threads, versions, and time of each step."""
    import torch

    laps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.laps.items())
    return [
        ("seed", str(seed)),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("versions", f"longspan {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("time", f"{laps}; {clock.total / 60:.1f} min in all"),
    ]
