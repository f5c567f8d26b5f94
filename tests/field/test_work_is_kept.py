"""What was trained or read is saved, whatever ends the process; the output path is checked before the work begins."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cli.command import Command

from longspan.errors import CheckpointError
from longspan.files import read_tensors, write_json, write_text
from longspan.train import Display, evaluate_text, load_run, read_log, run
from longspan.train import checkpoint as checkpoints

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def hangups() -> Iterator[None]:
    """The terminal's hangup ends a process, also where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"]


def recipe_of(folder: Path, **train: object) -> dict[str, Any]:
    return {
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "mixers": [{"name": "window", "window": 12}]},
        "task": {"name": "text", "source": str(folder / "documents"), "validation_every": 4},
        "train": {"steps": 4, "lanes": 4, "segment_length": 16, "warmup": 0, "threads": 1, "checkpoint_every": 0}
        | train,
    }


class Signals(Display):
    """Sends itself a signal when an evaluation begins."""

    def __init__(self, number: int, times: int = 1) -> None:
        self.number, self.times = number, times
        self.messages: list[str] = []

    def step(self, line: dict[str, Any]) -> None:
        self.line = line

    def evaluating(self, read: int, total: int) -> None:
        if self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)
            time.sleep(0.02)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_in_the_final_evaluation_loses_no_training(folder: Path, tmp_path: Path, name: str) -> None:
    whole = run(recipe_of(folder), tmp_path / "whole", progress="none")
    display = Signals(getattr(signal, name))
    outcome = run(recipe_of(folder), tmp_path / "run", progress=display)
    assert (outcome.interrupted, outcome.step, outcome.evaluation) == (True, 4, None)
    assert "saved" in display.messages[0]
    (newest,) = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.check(newest)["position"]["step"] == 4
    assert load_run(tmp_path / "run")[0].config.dim == 16
    assert run(None, tmp_path / "run", resume=True, progress="none").evaluation == whole.evaluation


def test_the_trained_model_is_there_before_the_final_evaluation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: Any, **kwargs: Any) -> Any:
        assert (tmp_path / "checkpoints" / "step-00000004").is_dir()
        seen.append(sorted(path.name for path in (tmp_path / "model").iterdir()))
        return evaluate_text(*args, **kwargs)

    seen: list[list[str]] = []
    monkeypatch.setattr("longspan.train.held_out.evaluate_text", look)
    run(recipe_of(folder), tmp_path, progress="none")
    assert seen
    assert {"config.json", "model.safetensors"} <= set(seen[0])


def test_held_out_text_that_cannot_be_evaluated_loses_no_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("longspan.train.held_out.evaluate_text", fail)
    with pytest.raises(MemoryError):
        run(recipe_of(folder), tmp_path, progress="none")
    monkeypatch.undo()
    assert load_run(tmp_path)[0].config.dim == 16
    assert run(None, tmp_path, resume=True, progress="none").evaluation is not None


def test_an_interrupted_evaluation_is_repeated_on_resume(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, eval_every=2)

    def validations(name: str) -> list[tuple[int, Any]]:
        return [
            (line["step"], line["validation"])
            for line in read_log(tmp_path / name / "log.jsonl")
            if "validation" in line
        ]

    run(recipe, tmp_path / "whole", progress="none")
    outcome = run(recipe, tmp_path / "parts", progress=Signals(signal.SIGTERM))
    assert (outcome.interrupted, outcome.step) == (True, 2)
    run(None, tmp_path / "parts", resume=True, progress="none")
    assert validations("parts") == validations("whole")
    assert [step for step, _ in validations("whole")] == [2, 4]


def test_a_curriculum_is_saved_when_the_terminal_is_closed(tmp_path: Path) -> None:
    class Closed(Display):
        def step(self, line: dict[str, Any]) -> None:
            if line["step"] == 2:
                os.kill(os.getpid(), signal.SIGHUP)

    recipe = {
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "mixers": [{"name": "infini", "segment": 32}]},
        "task": {"name": "passkey", "length": 400},
        "train": {"curriculum": "passkey", "steps": 5, "log_every": 1, "checkpoint_every": 0, "tokens": 800},
    }
    outcome = run(recipe, tmp_path, progress=Closed())
    assert (outcome.interrupted, outcome.step) == (True, 2)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


def test_a_hangup_that_is_ignored_stays_ignored(folder: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not run(recipe_of(folder), tmp_path, progress=Signals(signal.SIGHUP)).interrupted
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.long)])
def test_a_stream_saves_when_it_is_ended(byte_run: Path, tmp_path: Path, name: str) -> None:
    state, log = tmp_path / "state", tmp_path / "log"
    command = ["stream", str(byte_run), "-", f"--save-state={state}", f"--log={log}"]
    with subprocess.Popen(
        [sys.executable, "-m", "longspan.cli", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"the people of this union")
        process.stdin.flush()
        until = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(getattr(signal, name))
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert b"--skip 24" in error
    assert state.is_file()


TEXT = b"the people of this union and congress\n" * 40


@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b"\xed\xa0\x80"])
def test_an_invalid_byte_ends_a_stream_after_the_text_before_it(
    longspan: Command, subword_run: Path, tmp_path: Path, bad: bytes
) -> None:
    file, state = tmp_path / "file", tmp_path / "state"
    file.write_bytes(TEXT + bad + TEXT)
    error = longspan("stream", subword_run, file, "--quiet", "--save-state", state).error
    assert f"not UTF-8 at byte {len(TEXT):,}" in error
    assert f"--skip {len(TEXT)}" in error
    # continuing from there equals continuing from the text before the byte
    (tmp_path / "front").write_bytes(TEXT)
    (tmp_path / "behind").write_bytes(TEXT)
    assert longspan("stream", subword_run, tmp_path / "front", "--save-state", tmp_path / "alone", "--quiet").code == 0
    losses = []
    for copied_state in (state, tmp_path / "alone"):
        out = tmp_path / f"{copied_state.name}.losses"
        options = ["--quiet", "--losses", out, "--load-state", copied_state]
        assert longspan("stream", subword_run, tmp_path / "behind", *options).code == 0
        losses.append(np.fromfile(out, "<f4"))
    first, second = losses
    assert np.array_equal(first, second)


@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b"\xed\xa0\x80", b"\xff\xfe\xf0\x9f"])
def test_invalid_bytes_are_replaced_as_python_replaces_them(
    longspan: Command, subword_run: Path, tmp_path: Path, bad: bytes
) -> None:
    data = TEXT + bad + TEXT + bad
    (tmp_path / "bad").write_bytes(data)
    (tmp_path / "good").write_bytes(data.decode(errors="replace").encode())
    losses = []
    for name in ("bad", "good"):
        out = tmp_path / f"{name}.losses"
        options = ["--errors", "replace", "--losses", out, "--save-state", tmp_path / "state"]
        outcome = longspan("stream", subword_run, tmp_path / name, *options)
        assert outcome.code == 0
        # the offset to continue from counts bytes of the file, not of the replacement characters
        assert f"--skip {(tmp_path / name).stat().st_size})" in outcome.err
        losses.append(np.fromfile(out, "<f4"))
    first, second = losses
    assert np.array_equal(first, second)


def test_a_text_that_ends_inside_a_character_is_read_to_there(
    longspan: Command, subword_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(TEXT + "€".encode()[:2])
    error = longspan("stream", subword_run, tmp_path / "file", "--quiet", "--save-state", tmp_path / "state").error
    assert f"not UTF-8 at byte {len(TEXT):,}" in error
    assert (tmp_path / "state").is_file()


def test_a_state_is_saved_at_a_byte_inside_a_character(longspan: Command, subword_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TEXT + "€".encode() + TEXT)
    options = ["--save-at", len(TEXT) + 1, "--save-state", tmp_path / "state"]
    assert longspan("stream", subword_run, tmp_path / "file", *options).code == 0
    assert (tmp_path / "state").is_file()


def test_a_full_disk_for_the_log_loses_no_reading(
    longspan: Command, byte_run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    options = ["--quiet", "--save-state", state, "--block", 2000, "--log", "/dev/full"]
    error = longspan("stream", byte_run, folder / "long.txt", *options).error
    assert "cannot be written" in error
    assert "--skip 2000" in error
    assert state.is_file()


def test_a_prompt_with_an_invalid_byte(longspan: Command, subword_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(TEXT + b"\xff" + TEXT)
    state = tmp_path / "state"
    arguments = ["generate", subword_run, "--prompt-file", tmp_path / "prompt", "-n", 3, "--save-state", state]
    error = longspan(*arguments).error
    assert f"--skip {len(TEXT)}" in error
    assert state.is_file()
    assert longspan(*arguments, "--errors", "replace").code == 0
    assert "strict or replace" in longspan(*arguments, "--errors", "ignore").error


@pytest.mark.parametrize("target", [".", "folder", "nowhere/state", "file/state", "/proc/none/state"])
@pytest.mark.parametrize("verb", ["stream", "generate"])
def test_where_a_state_goes_is_checked_before_the_reading(
    longspan: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    rest = ["nofile"] if verb == "stream" else ["-p", "the"]
    # the run is missing too: the error about the path comes first
    assert "cannot be written" in longspan(verb, "norun", *rest, "--save-state", target).error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


VERBS = {
    "train": ["norecipe.toml"],
    "convert": ["nomodel", "--to", "infini"],
    "reproduce": ["noclaim"],
    "eval": ["norun", "--task", "lm"],
    "quickstart": ["--reuse"],
    "quickstart-lm": ["--reuse"],
    "show text": ["norun", "notext"],
    "show patterns": [],
    "show spans": ["norun"],
    "show support": ["norun"],
    "show scaling": ["norun"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_folders_of_all_verbs_are_checked_first(longspan: Command, tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("text")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        error = longspan(*verb.split(), *VERBS[verb], "-o", target).error
        assert "cannot be written" in error
        assert "not a folder" in error


def test_a_file_cannot_take_the_place_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (".", "/", "..", str(tmp_path)):
        with pytest.raises(CheckpointError, match="is a folder"):
            write_text(target, "text")


def test_a_full_disk_for_the_output_is_reported() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "longspan", "--version"]
        completed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    (line,) = completed.stderr.splitlines()
    assert completed.returncode == 2
    assert line.startswith("longspan: error: ")
    assert line.endswith("No space left on device")


def test_a_verb_ended_by_sigterm_leaves_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longspan: Command
) -> None:
    def ended(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr("longspan.train.opening.load_run", ended)
    outcome = longspan("eval", "run")
    assert (outcome.code, outcome.err) == (130, "")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("write", [write_text, write_json])
def test_a_pipe_stays_a_pipe(tmp_path: Path, write: Callable[..., Any]) -> None:
    """Files are replaced by renaming, but a pipe is written into."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write(path, "some text")
    assert b"some text" in os.read(reader, 100)
    os.close(reader)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "state"
    link.symlink_to(tmp_path / "far" / "target")
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink()
        assert (tmp_path / "far" / "target").read_text() == text


def test_a_state_is_saved_through_a_link_and_into_a_pipe(
    longspan: Command, byte_run: Path, folder: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "state")
    for path in (tmp_path / "plain", link):
        assert longspan("stream", byte_run, folder / "long.txt", "--limit", 300, "--save-state", path).code == 0
    assert link.is_symlink()
    # the order of a file's header is not fixed
    saved = [read_tensors(tmp_path / name) for name in ("state", "plain")]
    assert saved[0][1] == saved[1][1]
    assert saved[0][0].keys() == saved[1][0].keys()
    assert all(torch.equal(tensor, saved[1][0][name]) for name, tensor in saved[0][0].items())
    broken = tmp_path / "broken"
    broken.symlink_to(tmp_path / "nowhere" / "state")
    outcome = longspan("stream", byte_run, folder / "long.txt", "--save-state", broken)
    assert "does not exist; create it first" in outcome.error
