"""`longspan show scaling`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longspan.cli.console import console, print_table, say
from longspan.cli.options import PageOption
from longspan.errors import CheckpointError, ConfigError, LongspanError

if TYPE_CHECKING:
    from longspan.cost.scaling import Fit
    from longspan.report import Picture, Table

_LAWS = (("compute", "C", "training FLOPs"), ("size", "N", "parameters"), ("data", "D", "tokens"))
_OF_LAW = ("parameters", "intervals", "undetermined", "residual")


def scaling(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    form: Annotated[
        str, typer.Option("--form", help="Of the law in parameters and tokens: chinchilla, kaplan, or none.")
    ] = "chinchilla",
    flops: Annotated[
        float, typer.Option("--flops", min=0, help="A budget to spend, 6 N D; 0: ten times that of the largest run.")
    ] = 0.0,
    output: PageOption = Path("out/scaling"),
) -> None:
    """Fit scaling laws to trained runs: loss by training FLOPs, by parameters, by tokens, and by both.

    Of each run: parameters without embeddings, tokens trained on, FLOPs with the keys that its mechanism attends to,
    and the loss of its last evaluation on held-back documents, tokens and FLOPs up to then. Laws of one variable are
    meant for runs that have enough of the other. Brackets are 95 % intervals, found by drawing the runs anew. Needs
    the extra `scaling`.

    Writes report.html, report.json and figures/.

    Examples:
      longspan show scaling runs/small runs/medium runs/large
      longspan show scaling runs/* --form kaplan --flops 1e18
    """
    if form not in ("chinchilla", "kaplan", "none"):
        raise ConfigError(f"--form {form!r}: chinchilla, kaplan or none")
    from longspan.cost.scaling import fit
    from longspan.report import Block, Section, Text, write_report

    runs, rows = _read_runs(runs)
    check_same_text(runs)
    blocks: list[Block] = [runs_table(rows)]
    data: dict[str, Any] = {"runs": rows, "laws": {}}
    for name, key, label in _LAWS:
        if len({row[key] for row in rows}) < 3:
            continue
        law = fit("power", {"x": [row[key] for row in rows], "loss": [row["loss"] for row in rows]})
        data["laws"][name] = {key: getattr(law, key) for key in _OF_LAW}
        blocks += [Text(f"{said(law, key)} ({name})"), law_figure(name, law, rows, key, label)]
    if form != "none":
        joint_law(form, rows, flops or 10 * max(row["C"] for row in rows), blocks, data)
    path = write_report(output, "longspan: scaling laws", [Section("Scaling laws", blocks)], data)
    for block in blocks:
        if isinstance(block, Text):
            console().print(block.text, markup=False)
        elif not hasattr(block, "alt"):
            print_table(block)  # type: ignore[arg-type]
    console().print(f"wrote {path}", markup=False)


def _read_runs(runs: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Runs and what they were; what is no run, or was never evaluated, is named and left out.

    Raises:
        CheckpointError: nothing is left.
    """
    rows, problems = [], []
    for run in runs:
        try:
            rows.append(read_run(run))
        except (LongspanError, OSError) as error:
            problems.append(str(error))
    if not rows:
        raise CheckpointError(f"no run among {len(runs)}: {problems[0]}" if len(runs) > 1 else problems[0])
    for problem in problems:
        say(f"left out: {problem}")
    return [row["run"] for row in rows], rows


def read_run(run: str) -> dict[str, Any]:
    """Parameters N, tokens D, FLOPs C and held-back loss of a run.

    Raises:
        CheckpointError: no run, or one that was never evaluated.
        ConfigError: a model that does not say which keys it attends to.
    """
    from longspan.cost.scaling import model_training_flops, non_embedding
    from longspan.files import read_json
    from longspan.models import Decoder
    from longspan.train import load_run, read_log

    model, _ = load_run(run)
    if not isinstance(model, Decoder):
        raise ConfigError(f"{run}: scaling laws are fitted to decoders, this is a {type(model).__name__}")
    tokens, loss = evaluated(read_log(Path(run) / "log.jsonl"), run)
    table = read_json(Path(run) / "recipe.json")["train"]
    carried = table["carry"] and model.traits.streams
    length = table["segment_length"] * (8 if carried else 1)
    cost = model_training_flops(model, tokens, length=length)
    return {"run": run, "N": non_embedding(model), "D": tokens, "C": cost, "loss": loss}


def evaluated(lines: list[dict[str, Any]], run: str) -> tuple[int, float]:
    """Tokens trained on and held-back loss at the last evaluation that a log holds.

    A run that is stopped, or still trains, has gone on since: its last tokens belong to no loss. Evaluations of older
    logs do not say their tokens; those of the step line at or before them do.

    Raises:
        CheckpointError: no evaluation, or none whose tokens are known.
    """
    tokens = last = loss = None
    for line in lines:
        last = line.get("tokens", last)
        validation = line.get("validation")
        if isinstance(validation, dict) and isinstance(validation.get("loss"), int | float):
            tokens, loss = last, float(validation["loss"])
    if loss is None:
        raise CheckpointError(f"{run}: was never evaluated on held-back documents; let it end, or set train.eval_every")
    if tokens is None:
        raise CheckpointError(f"{run}: its log holds no step at or before its evaluation; set train.log_every lower")
    if not isinstance(tokens, int) or tokens < 1 or not 0 < loss < math.inf:
        raise CheckpointError(f"{run}: no law fits a loss of {loss:g} after {tokens} tokens; its log.jsonl holds it")
    return tokens, loss


def check_same_text(runs: list[str]) -> None:
    """Losses are compared, so they must be of one text, in one tokenizer's tokens.

    Raises:
        ConfigError: they are not; names the runs, and the field where it is one.
    """
    from longspan.files import read_json

    def read(run: str) -> tuple[dict[str, Any], str]:
        # where ids are kept changes nothing
        task = {**read_json(Path(run) / "recipe.json")["task"], "cache": None}
        tokenizer = Path(run) / "tokenizer.json"
        return task, tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else ""

    first, known = read(runs[0])
    for run in runs[1:]:
        task, tokenizer = read(run)
        for name in (*first, *task):
            if task.get(name) != first.get(name):
                raise ConfigError(
                    f"{run}: task.{name} = {task.get(name)!r}, of {runs[0]} it is {first.get(name)!r}; "
                    "a law is fitted to losses on one text, by one tokenizer"
                )
        if tokenizer != known:
            raise ConfigError(f"{run}: another tokenizer than that of {runs[0]}; losses of a token are not comparable")


def said(law: "Fit", key: str) -> str:
    """A power law in a line."""
    if law.undetermined:
        return f"no law in {key}: these {law.runs} runs are too much alike; vary {key} more"
    exponent = law.parameters["a"]
    between = "[{:.4f}, {:.4f}]".format(*law.intervals["a"]) if "a" in law.intervals else "without an interval"
    return (
        f"loss = ({law.parameters['x_c']:.3g} / {key})^{exponent:.4f}, exponent {between}, "
        f"{law.residual:.1%} from the runs"
    )


def runs_table(rows: list[dict[str, Any]]) -> "Table":
    """What the runs were."""
    from longspan.report import Table

    lines = [
        (row["run"], f"{row['N']:,}", f"{row['D']:,}", f"{row['C']:.3g}", f"{row['loss']:.4f}")
        for row in sorted(rows, key=lambda row: row["C"])
    ]
    columns = ("run", "parameters", "tokens", "FLOPs", "loss, nats")
    return Table(columns=columns, rows=lines, right=(1, 2, 3, 4))


def law_figure(name: str, law: "Fit", rows: list[dict[str, Any]], key: str, label: str) -> "Picture":
    """Runs as points, the law through them."""
    import numpy as np

    from longspan.report.figures import Series, line_figure, picture

    values = [row[key] for row in rows]
    line = np.geomspace(min(values), max(values), 50)
    kind: Literal["points"] = "points"
    series = [
        Series(x=values, y=[row["loss"] for row in rows], label="runs", kind=kind),
        Series(x=line.tolist(), y=law.predict(x=line).tolist(), label="law"),
    ]
    return picture(
        f"scaling-{name}",
        lambda theme: line_figure(
            series, xlabel=label, ylabel="held-back loss, nats a token", xscale="log2", yscale="log", theme=theme
        ),
        alt=f"Held-back loss of the runs against {label}, and the power law through them.",
    )


def joint_law(form: str, rows: list[dict[str, Any]], flops: float, blocks: list[Any], data: dict[str, Any]) -> None:
    """The law in parameters and tokens, and what it says of a budget; a line where the runs are too few."""
    from longspan.cost.scaling import fit, optimal
    from longspan.report import Text

    table = {key: [row[key] for row in rows] for key in ("N", "D", "loss")}
    try:
        law = fit(form, table)  # type: ignore[arg-type]
    except ConfigError as error:
        blocks.append(Text(f"No law in parameters and tokens: {error}"))
        return
    values = ", ".join(_parameter(law, name) for name in law.parameters)
    sentence = f"{form}: {values}; {law.residual:.1%} from the runs."
    data["laws"][form] = {key: getattr(law, key) for key in _OF_LAW}
    try:
        best = optimal(law, flops)
    except ConfigError as error:
        blocks.append(Text(f"{sentence} No budget can be spent by it: {error}."))
        return
    shares = [1 - 6 * row["N"] * row["D"] / row["C"] for row in rows]
    blocks.append(
        Text(
            f"{sentence} With {flops:.3g} FLOPs: {best.parameters:,.0f} parameters on {best.tokens:,.0f} tokens, "
            f"expected loss {best.loss:.4f}. The budget is spent as 6 N D, without the term of the context, which is "
            f"{min(shares):.0%} to {max(shares):.0%} of these runs' FLOPs."
        )
    )
    data["optimum"] = {"flops": flops, "N": best.parameters, "D": best.tokens, "loss": best.loss, "context": "left out"}


def _parameter(law: "Fit", name: str) -> str:
    """A parameter with its interval, where it has one."""
    value = f"{name} = {law.parameters[name]:.4g}"
    if name in law.undetermined:
        return f"{value} (not determined)"
    return value if name not in law.intervals else "{} [{:.4g}, {:.4g}]".format(value, *law.intervals[name])
