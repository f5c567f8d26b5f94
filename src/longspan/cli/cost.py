"""`longspan cost`: parameters, FLOPs and bytes of a model as functions of the length, before anything is trained."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from longspan.cli.console import console, print_table, say
from longspan.cli.options import verb
from longspan.cli.outputs import check_output_folder
from longspan.errors import ConfigError, LongspanError

if TYPE_CHECKING:
    import torch

    from longspan.cost import Footprint
    from longspan.report import Table
    from longspan.train.speed import Speed
    from longspan.train.training_memory import TrainingMemory

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Options of `longspan cost`."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A recipe (file or name), a run, or a folder with the config.json of a model of transformers, "
            "converted or not. No weights are read.",
            show_default=False,
        ),
    ]
    length: Annotated[
        str, typer.Option("--length", metavar="N,...", help="Tokens of the text: 4096, 32k, 1M, 128Ki.")
    ] = "2Ki,8Ki,32Ki,128Ki,1M"
    mixers: Annotated[
        str,
        typer.Option(
            "--mixers", metavar="all|A,B", help="The same model with these mechanisms and their defaults in each layer."
        ),
    ] = ""
    batch: Annotated[int, typer.Option("--batch", min=1, help="Texts at a time.")] = 1
    memory: Annotated[
        str,
        typer.Option(
            "--memory", metavar="SIZE", help="Also the longest text that fits into so much memory: 800MB, 16GB, 24GiB."
        ),
    ] = ""
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Also the memory of a training step, by two steps on random text. For recipes and runs of text.",
        ),
    ] = False
    time: Annotated[
        bool,
        typer.Option(
            "--time",
            help="Also how fast this machine trains, reads and continues a text, by a few seconds of each; longer "
            "texts by their FLOPs.",
        ),
    ] = False
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="TYPE", help="dtype of weights and states: float32, bfloat16, float16 or float64."
        ),
    ] = "float32"
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="Write an HTML report with figures to this folder.")
    ] = ""
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False


class ModelCost(NamedTuple):
    """The cost of one model.

    Attributes:
        name: of the model or of its mechanism.
        parameters: number of parameters, shared ones counted once.
        weights: bytes of the parameters in the dtype of the options.
        at: by length.
        streamed: largest number of tokens whose state fits into the memory beside the weights; None = no limit, or no
            memory was given.
        training: bytes of tensors in a training step; None = not measured.
        process: bytes that a process takes for one, beyond what is resident before it; None = not measured.
        trained: longest row whose training fits into the memory; None = not measured, or no memory was given.
        speed: of this machine; None = not measured.
    """

    name: str
    parameters: int
    weights: int
    at: "dict[int, Footprint]"
    streamed: int | None
    training: "TrainingMemory | None"
    process: "TrainingMemory | None"
    trained: int | None
    speed: "Speed | None"


class Counted(NamedTuple):
    """A model to count.

    Attributes:
        name: of the model or of its mechanism.
        model: without weights where possible.
        recipe: with its table `model`; None = a pretrained model.
    """

    name: str
    model: Any
    recipe: dict[str, Any] | None


@verb(CostOptions)
def cost(options: CostOptions) -> None:
    """Tell what a model costs at any length: parameters, FLOPs, bytes of its state, beside softmax over everything.

    The figures are sums over the layers as configured, so mixed and converted models are counted layer by layer, and
    states are exact to the byte. FLOPs count 2 per multiply-add. With --training, the peak memory of a training step
    is measured at two lengths, since it grows in proportion to the length; of a converted model, with the fields of the
    recipe pretrained. The first figures are those of its tensors, the others what a process takes beyond imports and
    weights: on Linux up to twice as much, unless MALLOC_MMAP_THRESHOLD_=65536 makes it give freed memory back. With
    --time, a few training steps, a text of 2,048 tokens and 16 new ones are timed.

    Examples:
      longspan cost lm/window
      longspan cost lm/full --mixers all --length 64Ki --memory 16GB
      longspan cost quickstart-lm --training --memory 8GB --time
      longspan cost ./SmolLM2-135M --mixers window,infini,linear --dtype bfloat16 -o out/cost
    """
    from longspan.train.opening import parse_dtype

    if options.output:
        check_output_folder(options.output, "--output")
    lengths = [size("--length", part) for part in options.length.split(",")]
    budget = size("--memory", options.memory.removesuffix("B")) if options.memory else None
    dtype = parse_dtype(options.dtype)
    if dtype is None:
        raise ConfigError("--dtype: is empty; give one, for example float32")
    costs = [_measure(counted, lengths, budget, dtype, options) for counted in _models(options)]
    if options.output:
        path = _write_page(costs, lengths, options)
    if options.as_json:
        print(json.dumps(_plain(costs, lengths, options), indent=2))
        return
    out = console()
    for line, table in _tables(costs, lengths, options):
        out.print(f"\n{line}" if line else "", markup=False)
        print_table(table, out)
    if options.output:
        out.print(f"\n{path}", markup=False, highlight=False)


def size(option: str, text: str) -> int:
    """Parse a number with a unit: k, M, G are powers of 1,000, Ki, Mi, Gi of 1,024; raises ConfigError for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{option} {text!r}: expected a number such as 4096, 32k, 1M or 128Ki")
    value = int(float(match[1]) * (BINARY if match[3] else UNITS)[match[2].lower()])
    if value < 1:
        raise ConfigError(f"{option} {text!r}: must be at least 1")
    return value


def _models(options: CostOptions) -> list[Counted]:
    """Build the models to count, without weights where possible.

    Raises:
        ConfigError: no such recipe, run or folder, or a mechanism that does not exist.
    """
    from longspan import mixers
    from longspan.train.opening import is_pretrained_folder

    names = mixers.names() if options.mixers == "all" else [part.strip() for part in options.mixers.split(",")]
    recipe = None if is_pretrained_folder(options.model) else _recipe(options.model)
    models: list[Counted] = []
    for mixer in names:
        name = mixer or options.model
        try:
            if recipe is None:
                models.append(_pretrained(name, options.model, mixer))
            else:
                models.append(_own(name, recipe, mixer))
        except LongspanError as error:
            if options.mixers != "all":
                raise
            say(f"{name}: left out: {error}")
    return models


def _pretrained(name: str, folder: str, mixer: str) -> Counted:
    """Build a model of transformers, converted to a mechanism if one is given."""
    from longspan.hf.opening import open_empty

    return Counted(name, open_empty(folder, mixer), None)


def _own(name: str, recipe: dict[str, Any], mixer: str) -> Counted:
    """Build the model of a recipe or a run, with one mechanism in each layer if one is given."""
    from longspan.cost import countable_model

    table = dict(recipe["model"], **({"mixers": [{"name": mixer}]} if mixer else {}))
    return Counted(name, countable_model(table), {**recipe, "model": table})


def _recipe(model: str) -> dict[str, Any]:
    """Return the recipe of a run or the recipe of this name, with the size of the vocabulary."""
    from longspan import tasks
    from longspan.config import read_toml
    from longspan.files import read_object
    from longspan.train.recipes import locate_recipe

    run = Path(model) / "recipe.json"
    recipe = read_object(run) if run.is_file() else read_toml(locate_recipe(model))
    table = dict(recipe.get("model", {}))
    if table.get("kind") == "pretrained":
        raise ConfigError(f"{model}: trains a pretrained model; give its folder, model.source")
    if "vocab_size" not in table:
        task = tasks.resolve(recipe.get("task", {}))
        # learned vocabularies take the size that they may have at most; others, bytes among them, are read off the task
        is_learned = task.get("tokenizer") in ("subword", "word") or task["name"] == "memory"
        table["vocab_size"] = (is_learned and task["vocab_size"]) or tasks.build(task).vocab_size
    return {**recipe, "model": table}


def _measure(
    counted: Counted, lengths: list[int], budget: int | None, dtype: "torch.dtype", options: CostOptions
) -> ModelCost:
    """Return the cost of a model at all lengths."""
    from longspan.cost import footprint, longest_state

    parameters = sum(parameter.numel() for parameter in counted.model.parameters())
    weights = parameters * dtype.itemsize
    # a classifier over a recurrent memory adds one map per text
    model = getattr(counted.model, "recurrent", counted.model)
    training, process = _training(counted, options) if options.training else (None, None)
    return ModelCost(
        name=counted.name,
        parameters=parameters,
        weights=weights,
        at={length: footprint(model, length, batch_size=options.batch, dtype=dtype) for length in lengths},
        streamed=None if budget is None else longest_state(model, max(budget - weights, 0), dtype),
        training=training,
        process=process,
        trained=None if training is None or budget is None else (process or training).longest(budget),
        speed=_speed(counted, options) if options.time else None,
    )


def _speed(counted: Counted, options: CostOptions) -> "Speed":
    """Measure how fast this machine trains, reads and continues a text with a model."""
    from longspan.cli.runs import open_any_run
    from longspan.models import build_model
    from longspan.models.io import is_converted
    from longspan.train.speed import measure_speed
    from longspan.train.training_memory import text_training

    if counted.recipe is None and options.mixers:
        raise ConfigError("--time: is measured for recipes, runs and folders as they are; leave --mixers out")
    say(f"{counted.name}: measuring its speed")
    if counted.recipe is not None:
        return measure_speed(build_model(counted.recipe["model"]), text_training(counted.recipe))
    if is_converted(options.model):
        recipe = _tuning(options)
        return measure_speed(build_model(recipe["model"]), text_training(recipe))
    return measure_speed(open_any_run(options.model, device="cpu")[0], None)


def _training(counted: Counted, options: CostOptions) -> "tuple[TrainingMemory, TrainingMemory | None]":
    """Measure the memory of training a model with `--batch` rows per step: of its tensors, and of a process.

    The latter is None on systems that do not report the memory of a process.

    Raises:
        ConfigError: a pretrained model that is not converted.
    """
    from dataclasses import replace

    from longspan.errors import UnsupportedError
    from longspan.models import build_model
    from longspan.train.process_memory import process_memory
    from longspan.train.training_memory import text_training, training_memory

    recipe = counted.recipe or _tuning(options)
    config = text_training(recipe)
    # of as many parts as the rows can be split into
    parts = math.gcd(options.batch, config.accumulation)
    config = replace(config, lanes=options.batch, accumulation=parts)
    tensors = training_memory(build_model(recipe["model"]), config)
    try:
        return tensors, process_memory(recipe["model"], config)
    except UnsupportedError as error:
        say(f"{counted.name}: {error}")
        return tensors, None


def _tuning(options: CostOptions) -> dict[str, Any]:
    """Return the recipe `pretrained` for a converted model; raises ConfigError if the model is not converted."""
    from longspan.config import read_toml
    from longspan.models.io import is_converted
    from longspan.train import pretrained
    from longspan.train.recipes import find_recipe

    if options.mixers or not is_converted(options.model):
        raise ConfigError(
            f"--training: {options.model} is not a converted model as it is trained; convert it, and give that folder "
            "without --mixers"
        )
    recipe = read_toml(find_recipe("pretrained.toml"))
    pretrained.register_kind()
    return pretrained.complete_recipe({**recipe, "model": {**recipe["model"], "source": options.model}})


def _tables(costs: list[ModelCost], lengths: list[int], options: CostOptions) -> "list[tuple[str, Table]]":
    """Return the tables to show, each below a line of text."""
    from longspan.report import Table

    rows = "" if options.batch == 1 else f", {options.batch} texts at a time"
    pages: list[tuple[str, Table]] = []
    if len(costs) == 1:
        (only,) = costs
        what = f"{only.name}: {only.parameters:,} parameters{rows}"
        pages.append((what, _table("tokens", [(f"{length:,}", only.at[length]) for length in lengths])))
    else:
        for length in lengths:
            lines = [(cost.name, cost.at[length]) for cost in costs]
            pages.append((f"{options.model}, {length:,} tokens{rows}", _table("mixer", lines)))
    if options.memory or options.training:
        limits = [_limits(cost, options) for cost in costs]
        columns = ["model", "parameters", "weights"]
        columns += [f"longest text to stream in {options.memory}"] if options.memory else []
        columns += ["training, fixed", "training, per token of a row"] if options.training else []
        columns += ["process, fixed", "process, per token of a row"] if options.training else []
        columns += [f"longest row to train in {options.memory}"] if options.training and options.memory else []
        pages.append(("", Table(columns=columns, rows=limits, right=tuple(range(1, len(columns))))))
    if options.time:
        pages.append(("", _time_table(costs, lengths)))
    return pages


def _time_table(costs: list[ModelCost], lengths: list[int]) -> "Table":
    """Return the table of speeds, and of the time to read a text of every length."""
    from longspan.report import Table
    from longspan.train.planning import duration

    rows = []
    for cost in costs:
        assert cost.speed is not None, "--time measures every model"
        speed = cost.speed
        rows.append(
            (
                cost.name,
                "-" if speed.trained is None else f"{speed.trained:,.0f}",
                f"{speed.read:,.0f}",
                "-" if speed.written is None else f"{speed.written:,.0f}",
                *(duration(speed.seconds_to_read(at)) for at in cost.at.values()),
            )
        )
    columns = ("model", "trains tokens/s", "reads tokens/s", "new tokens/s", *(f"reads {n:,}" for n in lengths))
    caption = (
        "Measured on this machine with other programs running as they were; the time to read longer texts follows from "
        "their FLOPs."
    )
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))), caption=caption)


def _table(first: str, lines: "list[tuple[str, Footprint]]") -> "Table":
    """Return the table of costs with one line per length or per mechanism."""
    from longspan.report import Table, si_bytes

    rows = [
        (
            name,
            _flops(at.forward_flops),
            _flops(at.forward_flops / (at.length * at.batch_size)),
            _flops(at.further_flops),
            _flops(at.training_flops),
            "-" if at.state_bytes is None else si_bytes(at.state_bytes),
            si_bytes(at.kv_bytes),
        )
        for name, at in lines
    ]
    columns = (
        first,
        "FLOPs to read",
        "per token",
        "per further token",
        "FLOPs to train on",
        "state",
        "keys and values of all tokens",
    )
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))))


def _limits(cost: ModelCost, options: CostOptions) -> list[str]:
    """Return the line of a model in the table of memory."""
    from longspan.report import si_bytes

    line = [cost.name, f"{cost.parameters:,}", si_bytes(cost.weights)]
    if options.memory:
        line.append("no limit" if cost.streamed is None else f"{cost.streamed:,}")
    if cost.training is not None:
        for memory in (cost.training, cost.process):
            line += ["-", "-"] if memory is None else [si_bytes(memory.fixed), si_bytes(memory.per_token)]
    if cost.trained is not None:
        line.append(f"{cost.trained:,}")
    return line


def _flops(count: float) -> str:
    """Format a number of FLOPs with three digits and a unit: `1.23 G`."""
    for unit in ("", "K", "M", "G", "T", "P", "E"):
        if abs(count) < 1000 or unit == "E":
            break
        count /= 1000
    return f"{count:.3g} {unit}".strip() if count < 1000 else f"{count:,.0f} {unit}"


def _plain(costs: list[ModelCost], lengths: list[int], options: CostOptions) -> dict[str, Any]:
    """Return all figures as plain data for JSON."""
    from longspan.config import to_dict

    return {
        "model": options.model,
        "lengths": lengths,
        "dtype": options.dtype,
        "models": [
            {
                "name": cost.name,
                "parameters": cost.parameters,
                "weight_bytes": cost.weights,
                "at": [to_dict(at) for at in cost.at.values()],
                **({"longest_streamed": cost.streamed} if options.memory else {}),
                **({"longest_trained": cost.trained} if cost.trained is not None else {}),
                **({"training": to_dict(cost.training)} if cost.training is not None else {}),
                **({"process": to_dict(cost.process)} if cost.process is not None else {}),
                **(_plain_speed(cost) if cost.speed is not None else {}),
            }
            for cost in costs
        ],
    }


def _plain_speed(cost: ModelCost) -> dict[str, Any]:
    """Return measured tokens per second and seconds to read every length, for JSON."""
    speed = cost.speed
    assert speed is not None, "measured"
    rates = {"trained": speed.trained, "read": speed.read, "written": speed.written}
    seconds = {str(length): speed.seconds_to_read(at) for length, at in cost.at.items()}
    return {"tokens_per_second": rates, "seconds_to_read": seconds}


def _write_page(costs: list[ModelCost], lengths: list[int], options: CostOptions) -> Path:
    """Write the HTML report with figures of FLOPs and of the state by length."""
    from longspan.report import Picture, Section, Theme, write_report
    from longspan.report.figures import Series, line_figure, picture

    def drawn(name: str, values: "dict[str, list[float]]", ylabel: str, caption: str) -> Picture:
        """Return a figure with a line per model, both axes logarithmic."""
        series = [Series(x=lengths, y=y, label=label, kind="marked") for label, y in values.items()]

        def draw(theme: Theme) -> Any:
            """Draw it in the colors of a theme."""
            return line_figure(
                series, xlabel="tokens", ylabel=ylabel, xscale="log2", yscale="log", xticks=lengths, theme=theme
            )

        return picture(name, draw, alt=f"{ylabel} by length.", caption=caption)

    states = {
        cost.name: [float(at.state_bytes or 0) for at in cost.at.values()]
        for cost in costs
        if all(at.state_bytes for at in cost.at.values())
    }
    states["keys and values of all tokens"] = [float(at.kv_bytes) for at in costs[0].at.values()]
    reads = {cost.name: [at.forward_flops / (at.length * at.batch_size) for at in cost.at.values()] for cost in costs}
    pictures = [
        drawn("state", states, "bytes of the state", "Exact bytes after a text of each length, counts included."),
        drawn("flops", reads, "FLOPs per token", "FLOPs to read a text from an empty state, with logits, per token."),
    ]
    tables = _tables(costs, lengths, options)
    sections = [Section("By length", pictures)]
    sections += [Section(line or "Memory", [table]) for line, table in tables]
    return write_report(options.output, f"Cost of {options.model}", sections, _plain(costs, lengths, options))
