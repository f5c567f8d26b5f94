"""The steps after training: compare memories, stream in two processes, continue a text."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.cli.console import StatusLine, console, harmless, say
from longspan.cli.runs import open_run
from longspan.errors import LongspanError
from longspan.experiments.quickstart_lm.plan import HEAD, INFERENCE, PROMPT, WRITTEN, Plan
from longspan.report import si_bytes
from longspan.stream import StreamSession
from longspan.tasks.base import heads
from longspan.train import Evaluation, evaluate_text
from longspan.train.opening import reshape


def compare_memories(plan: Plan) -> dict[int, Evaluation]:
    """Evaluate the trained weights with memories of several lengths on the first bytes of each held-out document."""
    model, task = open_run(str(plan.run), device=plan.device)
    documents = heads(task.documents("validation"), HEAD)
    status, evaluations = StatusLine(every=0.0), {}
    for length in plan.memory_lengths:
        variant, note = reshape(model, [f"model.mixers.0.mem_len={length}"])
        if note:
            say(note)
        evaluations[length] = evaluate_text(variant, documents, chunk=256, batch=len(documents), unit=task.unit)
        status.show(f"memory of {length:>5,} bytes: {evaluations[length].bits_per_unit:.4f} bits per byte")
        status.end()
    return evaluations


@dataclass(frozen=True)
class Streamed:
    """Measurements of two processes, the second of which continued from the state that the first saved.

    Attributes:
        first: records of the first process, up to the position where it saved the state.
        second: records of the second process.
        equal: number of compared losses that are bitwise equal.
        compared: number of compared losses.
    """

    first: list[dict[str, Any]]
    second: list[dict[str, Any]]
    equal: int
    compared: int

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of both processes, with cumulative `bytes` and `seconds`."""
        end = self.first[-1]
        moved = [
            {**record, "bytes": record["bytes"] + end["bytes"], "seconds": record["seconds"] + end["seconds"]}
            for record in self.second
        ]
        return [*self.first, *moved]


def stream(plan: Plan) -> Streamed:
    """Stream the text: one process reads a little beyond the middle, another from the state saved there to the end."""
    out, state = plan.folder / "stream", plan.folder / "stream" / "half.state"
    out.mkdir(parents=True, exist_ok=True)
    status = StatusLine(every=10.0)
    first = [f"--save-at={plan.half}", f"--save-state={state}", f"--limit={plan.half + plan.compared}"]
    _run_process(plan, out / "first", first, status, 0)
    status.end()
    print(
        f"saved at byte {plan.half:,} ({si_bytes(state.stat().st_size)}); a new process continues from there",
        flush=True,
    )
    second = [f"--load-state={state}", f"--skip={plan.half}"]
    _run_process(plan, out / "second", second, status, plan.half)
    status.end()
    unstopped = np.fromfile(out / "first.losses", dtype="<u4")[plan.half : plan.half + plan.compared]
    resumed = np.fromfile(out / "second.losses", dtype="<u4")[: plan.compared]
    equal = int((unstopped == resumed).sum()) if len(unstopped) == len(resumed) else 0
    records = [record for record in _records(out / "first.jsonl") if record["bytes"] <= plan.half]
    return Streamed(records, _records(out / "second.jsonl"), equal, plan.compared)


def stream_command(plan: Plan, options: list[str]) -> list[str]:
    """Return the arguments of `longspan` for one of the two streaming processes."""
    settings = [f"--set={INFERENCE}", f"--block={plan.block}", f"--device={plan.device}"]
    return ["stream", str(plan.run), str(plan.text), *settings, *options]


def _run_process(plan: Plan, name: Path, options: list[str], status: StatusLine, offset: int) -> None:
    """Run `longspan stream` in a new process and show the last line of its log meanwhile.

    Raises:
        LongspanError: the process failed; with its error message.
    """
    log = name.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    files = [f"--log={log}", f"--losses={name.with_suffix('.losses')}", "--quiet"]
    command = [sys.executable, "-m", "longspan.cli", *stream_command(plan, [*options, *files])]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                time.sleep(0.2)
                _show(log, status, offset, plan.size)
        except BaseException:
            process.terminate()
            raise
        message = process.stderr.read().strip() if process.stderr else ""
    if process.returncode:
        reason = (
            message.splitlines()[-1].removeprefix("longspan: error: ") if message else f"exit code {process.returncode}"
        )
        raise LongspanError(f"streaming in a separate process failed: {reason}")
    _show(log, status, offset, plan.size)


def _show(log: Path, status: StatusLine, offset: int, size: int) -> None:
    """Show the newest record of a log on the status line; `offset` bytes were read by an earlier process."""
    records = _records(log)
    if records:
        last = records[-1]
        position = min(offset + last["bytes"], size)
        memory = "" if last["resident"] is None else f"  {si_bytes(last['resident'])} resident"
        status.show(
            f"{position:>11,} bytes {position / size:4.0%}  {last['bits_per_byte']:.4f} bits/byte  "
            f"{last['bytes_per_second']:>7,.0f} bytes/s{memory}"
        )


def _records(log: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON log; an empty list if there is no file."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


@dataclass(frozen=True)
class Written:
    """Text that the model generated after `prompt`, the start of the held-out document `name`."""

    name: str
    prompt: str
    text: str


def write_on(plan: Plan) -> Written:
    """Let the model continue the newest held-out document, and print the prompt and the continuation."""
    model, task = open_run(str(plan.run), [INFERENCE], device=plan.device)
    documents = task.documents("validation")
    start = task.tokenizer.decode(documents[-1].cut(0, min(PROMPT, len(documents[-1]))).targets.tolist())
    # cut at the end of a word
    prompt = (start[: start.rindex(b" ") + 1] if b" " in start else start).decode(errors="replace")
    (plan.folder / "prompt.txt").write_text(prompt, encoding="utf-8")
    session = StreamSession(model)
    session.feed([task.tokenizer.begin, *task.tokenizer.encode(prompt.encode()).tolist()])
    ends = task.tokenizer.ends
    generator = torch.Generator().manual_seed(0)
    tokens = session.generate(WRITTEN, temperature=0.7, top_p=0.95, generator=generator, stop=ends)
    written = task.tokenizer.decode(token for token in tokens if token not in ends)
    text = harmless(written.decode(errors="replace"))
    out = console()
    out.print(prompt, style="dim", end="", markup=False, soft_wrap=True)
    out.print(f">>> {text}", markup=False, soft_wrap=True)
    return Written(documents.names[-1], prompt, text)
