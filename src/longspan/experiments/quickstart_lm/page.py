"""The page of the quickstart: checks, figures, numbers, and next commands."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longspan.cli.console import interval
from longspan.cli.runs import open_run
from longspan.experiments.checks import Check, check_table, conclusion
from longspan.experiments.quickstart_lm.plan import HEAD, INFERENCE, Plan
from longspan.experiments.quickstart_lm.steps import Streamed, Written
from longspan.experiments.tour import Clock, machine_facts
from longspan.files import read_json
from longspan.report import Picture, Quote, Section, Table, Text, si_bytes, write_report
from longspan.report.figures import Mark, Series, interval_series, line_figure, picture_of
from longspan.report.tables import judged
from longspan.train import Evaluation, read_log

TITLE = "longspan: one text of any length, in constant memory"
NUMBERS = "All numbers on this page are in report.json next to it, the figures in figures/."


def write(
    plan: Plan, checks: list[Check], memory: dict[int, Evaluation], streamed: Streamed, written: Written, clock: Clock
) -> Path:
    """Draw the figures and write the HTML page of the quickstart; return its path."""
    log = read_log(plan.run / "log.jsonl")
    facts = _facts(plan, log, streamed, clock)
    sections = [
        Section("What came out", [conclusion(checks, _reasons(plan, memory, streamed, clock), _commands(plan))]),
        Section("Checks", [check_table(checks)]),
        Section("The stream", _stream_blocks(plan, streamed)),
        Section("Length of the memory", _memory_blocks(plan, memory)),
        Section("Training", [_training_picture(log)]),
        Section("Generated text", _writing_blocks(written)),
        Section("Details of the run", [Table(columns=("", ""), rows=facts), Text(NUMBERS)]),
    ]
    data = {
        "checks": [check.record() for check in checks],
        "facts": dict(facts),
        "stream": {"records": streamed.records, "equal": streamed.equal, "compared": streamed.compared},
        "memory": {str(length): _plain(evaluation, memory[0]) for length, evaluation in memory.items()},
        "training": log,
        "written": asdict(written),
        "seconds": {**clock.laps, "total": clock.total},
    }
    lead = (
        f"A byte-level Transformer-XL, trained for a few minutes, read {plan.text_name} ({plan.size:,} bytes) as one "
        "document. It was stopped halfway; another process continued from the saved state. longspan quickstart-lm made "
        "this page and checks its claims."
    )
    return write_report(plan.folder, TITLE, sections, data, lead=lead, footer="made by longspan quickstart-lm")


def _plain(evaluation: Evaluation, without: Evaluation) -> dict[str, Any]:
    """Return an evaluation, its interval and its difference to the one without memory, as plain data."""
    return {
        **evaluation.summary(),
        "interval": list(evaluation.interval()),
        "minus_none": list(evaluation.minus(without)),
    }


def _stream_blocks(plan: Plan, streamed: Streamed) -> list[Picture | Text]:
    """Plot bits per byte, resident memory (where known) and speed along the text."""
    records = streamed.records
    position = [record["bytes"] / 1e6 for record in records]
    where = f"position in {plan.text_name} (MB)"
    mark = [Mark(plan.half / 1e6, "saved; a new process continues")]

    def draw(name: str, label: str, series: Sequence[Series], alt: str, caption: str, **more: Any) -> Picture:
        """Plot series against the position in the text, with a mark where the process was replaced."""
        return picture_of(
            line_figure, name, series, xlabel=where, ylabel=label, marks=mark, **more, alt=alt, caption=caption
        )

    bits = [
        Series(x=position, y=_running_mean(records), label="all bytes so far"),
        Series(
            x=position, y=[record["bits_per_byte"] for record in records], label="each block", kind="faint", color=0
        ),
    ]
    blocks: list[Picture | Text] = [
        draw(
            "bits-per-byte",
            "bits per byte",
            bits,
            f"Bits per byte along {plan.text_name}, without a jump where the process was replaced.",
            "Bits per byte of each block and of the text so far, which is not in the training text. Replacing the "
            "process changes nothing.",
        )
    ]
    if records[0]["resident"] is not None:
        resident = [record["resident"] / 2**20 for record in records]
        blocks.append(
            draw(
                "resident-memory",
                "resident memory (MiB)",
                [Series(x=position, y=resident)],
                "Resident memory along the text: flat.",
                "Memory of the process, Python and PyTorch included. The state of the model takes "
                f"{si_bytes(records[-1]['state_bytes'])} of it, at any position.",
                ylim=(0, max(resident) * 1.25),
            )
        )
    speeds = [record["bytes_per_second"] for record in records]
    blocks.append(
        draw(
            "speed",
            "bytes per second",
            [Series(x=position, y=speeds)],
            "Bytes per second along the text: flat.",
            "The speed does not depend on the position; other programs on the same cores can cause dips.",
            ylim=(0, max(speeds) * 1.25),
        )
    )
    return blocks


def _running_mean(records: list[dict[str, Any]]) -> list[float]:
    """Return bits per byte of the text up to each record."""
    total, last, means = 0.0, 0, []
    for record in records:
        total += record["bits_per_byte"] * (record["bytes"] - last)
        last = record["bytes"]
        means.append(total / last)
    return means


def _memory_blocks(plan: Plan, memory: dict[int, Evaluation]) -> list[Picture | Table | Text]:
    """Plot and tabulate held-out bits per byte by the length of the memory."""
    lengths = list(memory)
    series = [interval_series(lengths, [evaluation.interval() for evaluation in memory.values()])]
    drawn = picture_of(
        line_figure,
        "memory-length",
        series,
        xlabel="memory (bytes before the segment)",
        ylabel="bits per byte on held-out documents",
        marks=[Mark(plan.mem_len, "in training")],
        xscale="log2",
        xticks=lengths,
        alt="Bits per byte against the length of the memory: falling.",
        caption="The same weights with several lengths of memory. The band is a 95 % interval over documents; it is "
        "wide because documents differ. The table compares each length with no memory on the same documents.",
    )
    rows = [
        (f"{length:,}", interval(evaluation.interval()), interval(evaluation.minus(memory[0])) if length else "")
        for length, evaluation in memory.items()
    ]
    table = Table(columns=("memory (bytes)", "bits per byte", "difference from no memory"), rows=rows, right=(0, 1, 2))
    count = len(next(iter(memory.values())).names)
    note = Text(f"Measured on the first {HEAD:,} bytes of each of the {count} held-out documents.")
    return [drawn, table, note]


def _training_picture(log: list[dict[str, Any]]) -> Picture:
    """Plot bits per byte in training and on held-out documents over the minutes of training."""
    steps = [line for line in log if "bits_per_byte" in line]
    validations = [line for line in log if "validation" in line]
    series = [
        Series(
            x=[line["seconds"] / 60 for line in steps], y=[line["bits_per_byte"] for line in steps], label="training"
        ),
        Series(
            x=[line["seconds"] / 60 for line in validations],
            y=[line["validation"]["bits_per_byte"] for line in validations],
            label="held-out documents",
            kind="marked",
        ),
    ]
    return picture_of(
        line_figure,
        "training",
        series,
        xlabel="minutes of training",
        ylabel="bits per byte",
        alt="Bits per byte over the minutes of training: falling.",
        caption="The last point uses all held-out documents, the others some of them.",
    )


def _writing_blocks(written: Written) -> list[Quote | Text]:
    """Return the prompt and the text that the model generated."""
    return [
        Text(f"The start of a held-out document ({written.name}) and the model's continuation (underlined):"),
        Quote(written.prompt, written.text),
        Text("After a few minutes of training the model writes words and phrases, but they make no sense."),
    ]


def _facts(plan: Plan, log: list[dict[str, Any]], streamed: Streamed, clock: Clock) -> list[tuple[str, str]]:
    """Return the rows of the table of facts: model, training, results, machine."""
    model, _ = open_run(str(plan.run), [INFERENCE], device=plan.device)
    recipe = read_json(plan.run / "recipe.json")
    config, train = model.config, recipe["train"]
    last = [line for line in log if "tokens_per_second" in line][-1]
    validation_bits = [line["validation"]["bits_per_byte"] for line in log if "validation" in line]
    records, mixer = streamed.records, config.mixers[0]
    layers = f"{config.num_layers} layers of dim {config.dim}, {config.num_heads} heads"
    segments = f"segments of {mixer['segment']}, memory of {plan.mem_len}"
    return [
        ("model", f"transformer_xl, {layers}, {segments}; {model.num_parameters():,} parameters"),
        ("training", f"{last['seconds'] / 60:.1f} minutes, {last['step']:,} steps, {last['tokens']:,} bytes seen"),
        ("held-out documents", f"{validation_bits[-1]:.4f} bits per byte" if validation_bits else "not measured"),
        (plan.text_name, f"{_running_mean(records)[-1]:.4f} bits per byte, {records[-1]['seconds']:.0f} s"),
        ("state", f"{records[-1]['state_bytes']:,} bytes at any position"),
        *machine_facts(train["seed"], clock),
    ]


def _reasons(plan: Plan, memory: dict[int, Evaluation], streamed: Streamed, clock: Clock) -> list[str]:
    """Say what the memory saves, how much was read, and what that cost."""
    longest = max(memory)
    gain = judged(memory[longest].minus(memory[0]))
    last = streamed.records[-1]
    return [
        f"Relative to no memory, the loss with a memory of {longest:,} bytes {gain} per byte.",
        f"The text of {last['bytes']:,} bytes was read at {last['bytes'] / last['seconds']:,.0f} bytes per second.",
        f"All of this took {clock.total / 60:.1f} minutes on this machine.",
    ]


def _commands(plan: Plan) -> list[str]:
    """Return the commands to try next, as text for a shell."""
    run, folder = shlex.quote(str(plan.run)), shlex.quote(str(plan.folder))
    return [
        f"longspan eval {run} FILE                      # bits per byte of your own text",
        f"longspan stream {run} FILE --save-state s     # any length; resume with --load-state s",
        f"longspan generate {run} --prompt-file {folder}/prompt.txt",
        f"longspan train --resume -o {run} --set train.minutes=30",
        "longspan compare --data FILE                   # which mechanism learns your own text",
        "longspan mixers                                # all mechanisms",
    ]
