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
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of the runs to fit.", show_default=False)
    ],
    form: Annotated[
        str, typer.Option("--form", help="Joint law in parameters and tokens: chinchilla, kaplan, or none.")
    ] = "chinchilla",
    flops: Annotated[
        float,
        typer.Option(
            "--flops", min=0, help="Compute budget (6 N D) to find the best model for; 0: 10 times the largest run."
        ),
    ] = 0.0,
    output: PageOption = Path("out/scaling"),
) -> None:
    """Fit scaling laws to trained runs: loss by training FLOPs, parameters, tokens, and parameters and tokens together.

    For each run, N is its parameters without embeddings, D the tokens it was trained on, and C its training FLOPs,
    including attention to the keys that its mechanism reads. The loss is that of the last evaluation on held-out
    documents; D and C count up to then. A law in one variable assumes that the other one does not limit the runs.
    Brackets are 95 % bootstrap intervals over the runs. Needs the extra `scaling`.

    Writes report.html, report.json and figures/.

    Examples:
      longspan show scaling runs/small runs/medium runs/large
      longspan show scaling runs/* --form kaplan --flops 1e18
    """
    if form not in ("chinchilla", "kaplan", "none"):
        raise ConfigError(f"--form {form!r}: must be chinchilla, kaplan or none")
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
        blocks += [Text(f"{law_text(law, key)} ({name})"), law_figure(name, law, rows, key, label)]
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
    """Return the usable runs and a record of each; print why others are skipped (not a run, never evaluated).

    Raises:
        CheckpointError: no run is usable.
    """
    rows, problems = [], []
    for run in runs:
        try:
            rows.append(read_run(run))
        except (LongspanError, OSError) as error:
            problems.append(str(error))
    if not rows:
        raise CheckpointError(f"none of {len(runs)} runs is usable: {problems[0]}" if len(runs) > 1 else problems[0])
    for problem in problems:
        say(f"skipped: {problem}")
    return [row["run"] for row in rows], rows


def read_run(run: str) -> dict[str, Any]:
    """Return a record of a run: non-embedding parameters N, tokens D, training FLOPs C, held-out loss (nats per token).

    Raises:
        CheckpointError: the folder is not a run, or the run was never evaluated.
        ConfigError: the model is not a decoder, the run has stages, or its attention FLOPs are unknown.
    """
    from longspan.cost.scaling import model_training_flops, non_embedding
    from longspan.files import read_json
    from longspan.models import Decoder
    from longspan.train import load_run, read_log

    model, _ = load_run(run)
    if not isinstance(model, Decoder):
        raise ConfigError(f"{run}: scaling laws need decoders, this is a {type(model).__name__}; leave it out")
    tokens, loss = evaluated(read_log(Path(run) / "log.jsonl"), run)
    table = read_json(Path(run) / "recipe.json")["train"]
    if table.get("stages"):
        raise ConfigError(f"{run}: scaling laws need runs without train.stages; leave it out")
    carried = table["carry"] and table.get("sampling") != "pieces" and model.traits.streams
    length = table["segment_length"] * (8 if carried else 1)
    cost = model_training_flops(model, tokens, length=length)
    return {"run": run, "N": non_embedding(model), "D": tokens, "C": cost, "loss": loss}


def evaluated(lines: list[dict[str, Any]], run: str) -> tuple[int, float]:
    """Return the training tokens and the held-out loss (nats per token) at the last evaluation in a log.

    Tokens after that evaluation do not count, because a run that was stopped or still trains has no loss for them.
    Evaluation lines of older logs have no token count; the last step line before them supplies it.

    Args:
        lines: of the log, as dicts.
        run: folder of the run, for error messages.

    Raises:
        CheckpointError: the log has no evaluation, or none with a known number of tokens.
    """
    tokens = last = loss = None
    for line in lines:
        last = line.get("tokens", last)
        validation = line.get("validation")
        if isinstance(validation, dict) and isinstance(validation.get("loss"), int | float):
            tokens, loss = last, float(validation["loss"])
    if loss is None:
        raise CheckpointError(
            f"{run}: was never evaluated on held-out documents; train it to the end, or set train.eval_every"
        )
    if tokens is None:
        raise CheckpointError(f"{run}: its log has no step line before the evaluation; lower train.log_every")
    if not isinstance(tokens, int) or tokens < 1 or not 0 < loss < math.inf:
        raise CheckpointError(
            f"{run}/log.jsonl: cannot fit a loss of {loss:g} after {tokens} tokens; leave this run out"
        )
    return tokens, loss


def check_same_text(runs: list[str]) -> None:
    """Check that all runs have the same text and tokenizer, so that their losses are comparable.

    Raises:
        ConfigError: two runs differ; the message names them and the field that differs.
    """
    from longspan.files import read_json

    def read(run: str) -> tuple[dict[str, Any], str]:
        """Return the `[task]` table of a run without its cache folder, and the text of its tokenizer.json or ""."""
        # the folder of cached token ids does not matter
        task = {**read_json(Path(run) / "recipe.json")["task"], "cache": None}
        tokenizer = Path(run) / "tokenizer.json"
        return task, tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else ""

    first, known = read(runs[0])
    for run in runs[1:]:
        task, tokenizer = read(run)
        for name in (*first, *task):
            if task.get(name) != first.get(name):
                raise ConfigError(
                    f"{run}: task.{name} = {task.get(name)!r}, but {first.get(name)!r} in {runs[0]}; "
                    "give runs on the same text with the same tokenizer"
                )
        if tokenizer != known:
            raise ConfigError(
                f"{run}: its tokenizer differs from that of {runs[0]}, so losses per token are not comparable; "
                "give runs with the same tokenizer"
            )


def law_text(law: "Fit", key: str) -> str:
    """Describe a power law in one line: formula, interval of the exponent, and mean deviation from the runs."""
    if law.undetermined:
        return f"no law in {key}: these {law.runs} runs are too similar; vary {key} more"
    exponent = law.parameters["a"]
    between = "[{:.4f}, {:.4f}]".format(*law.intervals["a"]) if "a" in law.intervals else "without an interval"
    return (
        f"loss = ({law.parameters['x_c']:.3g} / {key})^{exponent:.4f}, exponent {between}, "
        f"deviation from the runs {law.residual:.1%}"
    )


def runs_table(rows: list[dict[str, Any]]) -> "Table":
    """Return a table of the runs with their parameters, tokens, FLOPs and losses, sorted by FLOPs."""
    from longspan.report import Table

    lines = [
        (row["run"], f"{row['N']:,}", f"{row['D']:,}", f"{row['C']:.3g}", f"{row['loss']:.4f}")
        for row in sorted(rows, key=lambda row: row["C"])
    ]
    columns = ("run", "parameters", "tokens", "FLOPs", "loss, nats")
    return Table(columns=columns, rows=lines, right=(1, 2, 3, 4))


def law_figure(name: str, law: "Fit", rows: list[dict[str, Any]], key: str, label: str) -> "Picture":
    """Return a figure of the runs as points and a power law as a line, on logarithmic axes.

    Args:
        name: of the law, part of the file name.
        law: the fitted power law.
        rows: records of the runs.
        key: `"C"`, `"N"` or `"D"`, the quantity on the x axis.
        label: of the x axis.
    """
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
            series, xlabel=label, ylabel="held-out loss, nats per token", xscale="log2", yscale="log", theme=theme
        ),
        alt=f"Held-out loss of the runs by {label}, and the fitted power law.",
    )


def joint_law(form: str, rows: list[dict[str, Any]], flops: float, blocks: list[Any], data: dict[str, Any]) -> None:
    """Fit the joint law in parameters and tokens; append its text and the best model for a budget to the report.

    If the runs are too few, the text says so.

    Args:
        form: `"chinchilla"` or `"kaplan"`.
        rows: records of the runs.
        flops: compute budget, 6 N D.
        blocks: of the report; extended in place.
        data: of report.json; extended in place.
    """
    from longspan.cost.scaling import fit, optimal
    from longspan.report import Text

    table = {key: [row[key] for row in rows] for key in ("N", "D", "loss")}
    try:
        law = fit(form, table)  # type: ignore[arg-type]
    except ConfigError as error:
        blocks.append(Text(f"No joint law in parameters and tokens: {error}"))
        return
    values = ", ".join(_parameter(law, name) for name in law.parameters)
    sentence = f"{form}: {values}; deviation from the runs {law.residual:.1%}."
    data["laws"][form] = {key: getattr(law, key) for key in _OF_LAW}
    try:
        best = optimal(law, flops)
    except ConfigError as error:
        blocks.append(Text(f"{sentence} It cannot tell the best model for a budget: {error}."))
        return
    shares = [1 - 6 * row["N"] * row["D"] / row["C"] for row in rows]
    blocks.append(
        Text(
            f"{sentence} Best model for {flops:.3g} FLOPs: {best.parameters:,.0f} parameters on {best.tokens:,.0f} "
            f"tokens, expected loss {best.loss:.4f}. The budget counts 6 N D, without attention to the context, which "
            f"is {min(shares):.0%} to {max(shares):.0%} of these runs' FLOPs."
        )
    )
    data["optimum"] = {"flops": flops, "N": best.parameters, "D": best.tokens, "loss": best.loss, "context": "left out"}


def _parameter(law: "Fit", name: str) -> str:
    """Format a fitted parameter, with its interval if it has one."""
    value = f"{name} = {law.parameters[name]:.4g}"
    if name in law.undetermined:
        return f"{value} (not determined)"
    return value if name not in law.intervals else "{} [{:.4g}, {:.4g}]".format(value, *law.intervals[name])
