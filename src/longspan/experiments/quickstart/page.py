"""The page of the quickstart: checks, figures, numbers, and next commands."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longspan.contract.maps import device_and_dtype
from longspan.experiments.checks import Check, check_table, conclusion
from longspan.experiments.quickstart.measure import SURE, Reading
from longspan.experiments.tour import Clock, machine_facts
from longspan.files import read_json
from longspan.models import Encoder
from longspan.report import Passage, Picture, Section, Table, Text, write_report
from longspan.report.figures import Mark, Series, interval_series, line_figure, picture_of
from longspan.report.tables import interval
from longspan.tasks import MemoryTask
from longspan.tasks.memory import PLACES
from longspan.train import read_log, wilson

TITLE = "longspan: recall a fact after two million tokens"
NUMBERS = "All numbers on this page are in report.json next to it, the figures in figures/."


def write(
    output: Path, run: Path, model: Any, task: MemoryTask, readings: list[Reading], checks: list[Check], clock: Clock
) -> Path:
    """Draw the figures and write the HTML page of the quickstart; return its path."""
    log, recipe = read_log(run / "log.jsonl"), read_json(run / "recipe.json")
    facts = _facts(model, recipe, log, readings, clock)
    most = recipe["train"]["max_segments"]
    sections = [
        Section("What came out", [conclusion(checks, _reasons(readings, model, clock), _commands(run, output))]),
        Section("Checks", [check_table(checks)]),
        Section("Accuracy", [_accuracy(readings, most), _table(readings), *_example(model, task, readings)]),
        Section("Constant memory, constant speed", _constant(readings)),
        Section("Cost of a dense Transformer", _flops(model, task)),
        Section("Training", [_training(log)]),
        Section("Details of the run", [Table(columns=("", ""), rows=facts), Text(NUMBERS)]),
    ]
    data = {
        "checks": [check.record() for check in checks],
        "facts": dict(facts),
        "answers": [answer.record() for reading in readings for answer in reading.answers.values()],
        "training": log,
        "seconds": {**clock.laps, "total": clock.total},
    }
    last = readings[-1]
    lead = (
        f"A Recurrent Memory Transformer was trained on at most {most} segments of {task.config.segment_length} "
        f"tokens. Here it reads up to {last.segments:,} of them, {last.tokens:,} tokens of unseen text, with one "
        "sentence about who went where, and answers a question about it at the end. longspan quickstart made this "
        "page and checks its claims."
    )
    return write_report(output, TITLE, sections, data, lead=lead, footer="made by longspan quickstart")


def _accuracy(readings: list[Reading], most: int) -> Picture:
    """Plot accuracy with its intervals against the number of segments, one line per kind of question."""
    lengths = [reading.segments for reading in readings]
    series = [
        interval_series(lengths, [reading.answers[kind].interval() for reading in readings], label=kind)
        for kind in readings[0].answers
    ]
    chance = Mark(1 / 6, "chance", horizontal=True)
    return picture_of(
        line_figure,
        "accuracy",
        series,
        xlabel="segments of 499 tokens",
        ylabel="accuracy",
        marks=[Mark(most, "longest in training"), chance],
        xscale="log2",
        xticks=lengths,
        ylim=(0, 1.16),
        alt="Accuracy against the number of segments.",
        caption="Bands are 95 % intervals (Wilson); they are wide at the longest texts, which have few questions.",
    )


def _table(readings: list[Reading]) -> Table:
    """Return the table of answers by number of segments."""
    columns = ["segments", "tokens", *readings[0].answers, "cut facts", "false writes", "repeats"]
    rows = []
    for reading in readings:
        answers = list(reading.answers.values())
        silent = sum(answer.silent for answer in answers)
        rows.append(
            (
                f"{reading.segments:,}",
                f"{reading.tokens:,}",
                *(f"{sum(answer.right)} of {len(answer.right)}" for answer in answers),
                f"{sum(sum(answer.straddles) for answer in answers)}",
                f"{sum(answer.false_writes for answer in answers)} in {silent:,}",
                f"{max(answer.repeats for answer in answers):.2f} times",
            )
        )
    caption = (
        "Cut facts lie across a segment border. False writes: segments without a fact that wrote to memory. Repeats: "
        "how often a noise sentence occurs in a text, on average."
    )
    return Table(columns=columns, rows=rows, right=tuple(range(len(columns))), caption=caption)


def _example(model: Any, task: MemoryTask, readings: list[Reading]) -> list[Passage | Text]:
    """Show a sample of one segment with its facts and its question marked, the correct answer, and the model's."""
    kind = next(iter(readings[-1].answers))
    sample = task.sample("test", 1, [0], kind=kind)  # type: ignore[arg-type]
    (segment,) = list(sample)
    text = task.tokenizer.decode(segment.tokens).decode("utf-8", "replace").strip()
    model.eval()
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(segment.tokens)[None].to(device_and_dtype(model).device), None)
    chosen = PLACES[int(logits[0].argmax())]
    return [
        Text(
            "A sample of one segment, with the fact and the question marked. Noise consists of sentences from held-out "
            "speeches and the King James Bible, drawn one by one. A fact may be anywhere, even across a segment "
            "border, so that no segment contains all of it."
        ),
        Passage(mark_all(text, [*sample.what.facts, sample.what.question])),
        Text(f"The correct answer: {PLACES[sample.answer]}. The model's answer: {chosen}."),
    ]


def mark_all(text: str, passages: Sequence[str]) -> list[tuple[str, bool]]:
    """Split `text` into (piece, whether it is one of `passages`); passages that do not occur are ignored."""
    pattern = "|".join(re.escape(passage) for passage in sorted(passages, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]


def _constant(readings: list[Reading]) -> list[Picture | Text]:
    """Plot resident memory (where known) and speed against the number of segments."""
    lengths = [reading.segments for reading in readings]

    def draw(name: str, label: str, value: Callable[[Reading], float], alt: str, caption: str) -> Picture:
        """Plot one value of each reading against the number of segments."""
        values = [value(reading) for reading in readings]
        series = [Series(x=lengths, y=values, kind="marked")]
        return picture_of(
            line_figure,
            name,
            series,
            xlabel="segments of 499 tokens",
            ylabel=label,
            xscale="log2",
            xticks=lengths,
            ylim=(0, max(values) * 1.25),
            alt=alt,
            caption=caption,
        )

    blocks: list[Picture | Text] = []
    if all(reading.resident for reading in readings):
        blocks.append(
            draw(
                "resident-memory",
                "resident memory (MiB)",
                lambda reading: (reading.resident or 0) / 2**20,
                "Resident memory against the number of segments: flat.",
                "Peak of the process while reading, Python and PyTorch included; samples are generated segment by "
                "segment as they are read.",
            )
        )
    blocks.append(
        draw(
            "speed",
            "tokens per second",
            lambda reading: reading.tokens_per_second,
            "Tokens per second against the number of segments: flat.",
            "All rows of a batch together, generation of the samples included.",
        )
    )
    return blocks


def _flops(model: Any, task: MemoryTask) -> list[Picture | Text]:
    """Plot computed FLOPs per token of the model and of a dense Transformer of the same size."""
    recurrent, size = model.recurrent, task.config.segment_length
    config = recurrent.backbone.config
    with torch.device("meta"):
        dense = Encoder(replace(config, mixers=({"name": "full"},)))
    counts = [4**power for power in range(7)]
    our_flops = [recurrent.flops(count * size) / (count * size) for count in counts]
    dense_flops = [dense.flops(count * size) / (count * size) for count in counts]
    series = [
        Series(
            x=counts,
            y=[flops / 1e6 for flops in dense_flops],
            label="dense Transformer of the same size",
            kind="marked",
        ),
        Series(x=counts, y=[flops / 1e6 for flops in our_flops], label="recurrent memory", kind="marked"),
    ]
    drawn = picture_of(
        line_figure,
        "flops",
        series,
        xlabel="segments of 499 tokens",
        ylabel="million FLOPs per token, computed",
        xscale="log2",
        yscale="log",
        xticks=counts,
        alt="FLOPs per token against length: flat for recurrent memory, rising for a dense Transformer.",
        caption=f"At {counts[-1] * size:,} tokens a dense Transformer of this size needs "
        f"{dense_flops[-1] / our_flops[-1]:,.0f} times the work. (The claim rmt-flops covers the paper's model sizes.)",
    )
    return [drawn]


def _training(log: list[dict[str, Any]]) -> Picture:
    """Plot accuracy over the minutes of training, with a mark at each new stage."""
    minutes = [line["seconds"] / 60 for line in log]
    stages = [Mark(line["seconds"] / 60) for line in log if line["new_stage"]]
    series = [Series(x=minutes, y=[line["accuracy"] for line in log])]
    return picture_of(
        line_figure,
        "training",
        series,
        xlabel="minutes of training",
        ylabel="accuracy in training",
        marks=stages,
        ylim=(0, 1.03),
        alt="Accuracy over the minutes of training.",
        caption="Dashed lines: the next stage of the curriculum, first longer segments, then more of them.",
    )


def _facts(
    model: Any, recipe: dict[str, Any], log: list[dict[str, Any]], readings: list[Reading], clock: Clock
) -> list[tuple[str, str]]:
    """Return the rows of the table of facts: model, training, state, machine."""
    config, memory, last = model.recurrent.backbone.config, model.recurrent.config, log[-1]
    shape = f"encoder, {config.num_layers} layers of dim {config.dim}, {config.num_heads} heads"
    far = [reading for reading in readings if reading.segments > SURE]
    state = model.state_nbytes(1, 0)
    return [
        ("model", f"{shape}, {memory.num_memory_tokens} memory tokens; {model.num_parameters():,} parameters"),
        ("training", f"{last['seconds'] / 60:.1f} minutes, {last['step']:,} steps, {last['tokens']:,} tokens"),
        ("trained on", f"at most {last['segments']} segments of {memory.segment_length} tokens"),
        ("state", f"{state:,} bytes per text, at any length"),
        (
            f"after more than {SURE} segments",
            f"{sum(len(a.right) for reading in far for a in reading.answers.values())} questions",
        ),
        *machine_facts(recipe["train"]["seed"], clock),
    ]


def _reasons(readings: list[Reading], model: Any, clock: Clock) -> list[str]:
    """Say how many questions were answered after the longest texts, and what that cost."""
    last = readings[-1]
    answers = [right for kind in last.answers.values() for right in kind.right]
    state = f"{model.state_nbytes(1, 0):,} bytes per text"
    return [
        f"After {last.tokens:,} tokens the model answered {sum(answers)} of {len(answers)} questions, a share of "
        f"{interval(wilson(sum(answers), len(answers)), 2)}.",
        f"It kept {state} and read {last.tokens_per_second:,.0f} tokens per second.",
        f"All of this took {clock.total / 60:.1f} minutes on this machine.",
    ]


def _commands(run: Path, output: Path) -> list[str]:
    """Return the commands to try next, as text for a shell."""
    name, folder = shlex.quote(str(run)), shlex.quote(str(output))
    return [
        f"longspan eval {name} --segments 16,256 --count 128     # more questions",
        f"longspan quickstart --reuse -o {folder}      # the same model",
        "longspan compare --data FILE                   # which mechanism learns your own text",
        "longspan reproduce rmt --full                  # three tasks, three seeds, with intervals",
        "longspan quickstart-lm                         # a language model that streams a book",
    ]
