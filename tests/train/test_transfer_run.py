"""Attention transfer on text files: killed and continued, in parts, refused where settings differ."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from tests.hf.conftest import ids, save_llama

from longspan import hf
from longspan.errors import CheckpointError, ConfigError, DataError, LongspanError
from longspan.train import tracking, transfer_store
from longspan.train.tracking import TrackedRun
from longspan.train.transfer import TransferOutcome, TransferSettings, run_transfer
from longspan.train.transfer_display import TransferDisplay, make_transfer_display


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model."""
    return save_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture
def settings(source: Path, corpus: Path) -> TransferSettings:
    """A transfer that takes a second."""
    return TransferSettings(
        model=str(source),
        text=str(corpus),
        to="gated_delta",
        length=48,
        batch=2,
        held_out=6,
        config=hf.TransferConfig(steps=12),
    )


def run(settings: TransferSettings, out: Path, **options: Any) -> TransferOutcome:
    return run_transfer(settings, out, **{"device": "cpu", "checkpoint_every": 4, "progress": "none", **options})


def changed(settings: TransferSettings, **changes: Any) -> TransferSettings:
    config = {name: changes.pop(name) for name in list(changes) if name in ("loss", "steps", "lr", "seed")}
    return dataclasses.replace(settings, config=dataclasses.replace(settings.config, **config), **changes)


def same_weights(left: Path, right: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (left, right))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def errors_of(outcome: TransferOutcome, when: str = "after") -> list[float]:
    assert outcome.report is not None
    return [line[f"error_{when}"] for line in outcome.report["layers"]]


def test_the_model_is_written_as_convert_writes_it(settings: TransferSettings, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = run(settings, tmp_path / "out", eval_every=5, log_every=3)
    assert sum(errors_of(outcome)) < sum(errors_of(outcome, "before"))
    model = hf.load(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "<|begin|>"
    text = ids(1, 30)
    assert torch.equal(model(text).logits, loaded(text).logits)
    model.save_pretrained(tmp_path / "again")
    assert same_weights(tmp_path / "out", tmp_path / "again")
    # the weights are those that were measured
    held_out = [ids(2, 30)]
    with hf.Transfer(model, hf.TransferConfig()) as transfer:
        ours = transfer.errors(held_out)
    assert not any(error != error for error in ours.values())
    part = tmp_path / "out" / "transfer" / "layers-all"
    assert sorted(path.name for path in part.iterdir()) == [
        "log.jsonl",
        "report.json",
        "settings.json",
        "trained.safetensors",
    ]
    lines = [json.loads(line) for line in (part / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10, 12]
    assert [line["step"] for line in lines if "errors" in line] == [5, 10, 12]
    assert list(lines[-1]["errors"].values()) == errors_of(outcome)


def test_a_transfer_is_tracked(settings: TransferSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[TrackedRun] = []
    figures: list[tuple[int, Any]] = []

    class Recorder:
        def __init__(self, tracked: TrackedRun) -> None:
            runs.append(tracked)

        def log(self, values: Any, step: int) -> None:
            figures.append((step, values))

        def close(self) -> None:
            pass

    monkeypatch.setitem(tracking.TRACKERS, "wandb", Recorder)
    monkeypatch.setitem(sys.modules, "wandb", tracking)
    run(changed(settings, layers=(1,), steps=3), tmp_path / "out", log_every=2, track="wandb")
    (tracked,) = runs
    part = tmp_path / "out/transfer/layers-1"
    assert (tracked.name, tracked.folder, tracked.step) == ("out layers-1", part, 0)
    assert (tracked.settings["to"], tracked.settings["steps"]) == ("gated_delta", 3)
    assert [step for step, _ in figures] == [2, 3]
    assert {"loss/1", "errors/1", "seconds"} == figures[-1][1].keys()


SCRIPT = """
import json, sys
from longspan.hf import TransferConfig
from longspan.train.transfer import TransferSettings, run_transfer
settings = json.loads(sys.argv[1])
config = TransferConfig(**settings.pop("config"))
settings = TransferSettings(**settings, config=config)
run_transfer(settings, sys.argv[2], device="cpu", checkpoint_every=4, progress="none")
"""


@pytest.mark.long
@pytest.mark.long
def test_a_killed_transfer_continues_bit_for_bit(settings: TransferSettings, tmp_path: Path) -> None:
    # random projections that are redrawn, and long enough to be killed
    settings = changed(
        settings, to="performer", fields={"num_features": 8, "redraw_every": 5}, loss="outputs", steps=60
    )
    run(settings, tmp_path / "whole")
    part = tmp_path / "parts" / "transfer" / "layers-all"
    plain = json.dumps(dataclasses.asdict(settings))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, plain, str(tmp_path / "parts")])
    while not list(part.glob("checkpoints/step-*")):
        assert process.poll() is None, "the transfer ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "parts" / "config.json").exists()
    outcome = run(settings, tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert outcome.report is not None
    assert outcome.report["layers"] == run(settings, tmp_path / "whole").report["layers"]  # type: ignore[index]


class Stops(TransferDisplay):
    """Dies at the n-th line of the log, or interrupts there."""

    def __init__(self, count: int, *, error: BaseException | None = None) -> None:
        self.left, self.error = count, error

    def step(self, text: str) -> None:
        self.left -= 1
        if not self.left:
            if self.error is not None:
                raise self.error
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("line", [3, 6, 13, 15])
def test_a_transfer_continues_in_every_phase(settings: TransferSettings, tmp_path: Path, line: int) -> None:
    settings = changed(settings, distill=5, keep_softmax=1)
    whole = run(settings, tmp_path / "whole")
    with pytest.raises(KeyError):
        run(settings, tmp_path / "parts", progress=Stops(line, error=KeyError()), log_every=1)
    continued = run(settings, tmp_path / "parts")
    assert whole.report is not None
    assert continued.report is not None
    for name in ("layers", "divergence", "softmax_layers"):
        assert continued.report[name] == whole.report[name]
    assert len(whole.report["softmax_layers"]) == 1
    assert whole.step == 17
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    streamed = hf.ConvertedDecoder(hf.load(tmp_path / "whole"))
    assert streamed.traits.streams


def test_layers_that_keep_softmax_are_chosen_once(settings: TransferSettings, tmp_path: Path) -> None:
    settings = changed(settings, layers="auto:1", steps=6)
    whole = run(settings, tmp_path / "whole").report
    with pytest.raises(KeyError):
        run(settings, tmp_path / "parts", progress=Stops(5, error=KeyError()), log_every=1)
    continued = run(settings, tmp_path / "parts").report
    assert whole is not None
    assert continued is not None
    for name in ("layers", "softmax_layers", "costs"):
        assert continued[name] == whole[name]
    (kept,) = whole["softmax_layers"]
    costs = {cost["layer"]: cost["divergence"] for cost in whole["costs"]["costs"]}
    assert costs[kept] == max(costs.values())
    assert [line["layer"] for line in whole["layers"]] == [1 - kept]
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_an_interrupt_saves_and_the_same_call_continues(settings: TransferSettings, tmp_path: Path) -> None:
    run(settings, tmp_path / "whole")
    outcome = run(settings, tmp_path / "parts", progress=Stops(6), log_every=1)
    assert outcome.interrupted
    assert outcome.step == 6
    assert run(settings, tmp_path / "parts").step == 12
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


class Notes(TransferDisplay):
    """Remembers messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_a_damaged_checkpoint_is_passed_over(settings: TransferSettings, tmp_path: Path) -> None:
    run(settings, tmp_path / "whole")
    with pytest.raises(KeyError):
        run(settings, tmp_path / "parts", progress=Stops(9, error=KeyError()), log_every=1)
    part = tmp_path / "parts" / "transfer" / "layers-all"
    newest = part / "checkpoints" / "step-00000008" / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    display = Notes()
    run(settings, tmp_path / "parts", progress=display)
    assert "step-00000008" in display.messages[0]
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_kill_while_the_model_is_written_is_repaired(
    settings: TransferSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings, tmp_path / "whole")
    replace, instants = os.replace, 0
    for instant in range(1, 100):
        calls = 0

        def dying(source: Any, target: Any, instant: int = instant) -> None:
            nonlocal calls
            if Path(target).parent == tmp_path / "parts":
                calls += 1
                if calls == instant:
                    raise KeyError
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                run(settings, tmp_path / "parts")
            except KeyError:
                instants += 1
                assert not (tmp_path / "parts" / "config.json").exists()
            else:
                break
    assert instants > 3
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert list((tmp_path / "parts").glob(".*")) == []


@pytest.mark.parametrize("order", [((0,), (1,)), ((1,), (0,))])
def test_processes_with_different_layers_make_one_model(
    settings: TransferSettings, tmp_path: Path, order: tuple[tuple[int, ...], ...]
) -> None:
    # without random initial weights, so that the order does not matter
    settings = changed(settings, to="infini", fields={"segment": 8})
    run(settings, tmp_path / "whole")
    first, second = order
    run(changed(settings, layers=first), tmp_path / "parts")
    half = hf.load(tmp_path / "parts")
    assert list(hf.mechanisms(half)) == list(first)
    run(changed(settings, layers=second, keep_softmax=0), tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert list(hf.mechanisms(hf.load(tmp_path / "parts"))) == [0, 1]
    with pytest.raises(ConfigError, match="already teaches the same layers"):
        run(settings, tmp_path / "parts")


def test_a_converted_model_is_taught(settings: TransferSettings, source: Path, tmp_path: Path) -> None:
    from longspan.hf.decoder import open_pretrained

    opened = open_pretrained(str(source))
    hf.convert(opened.model, "infini", segment=8)
    for part in opened:
        part.save_pretrained(tmp_path / "converted")
    there = changed(settings, model=str(tmp_path / "converted"), to="")
    outcome = run(there, tmp_path / "out")
    run(changed(settings, to="infini", fields={"segment": 8}), tmp_path / "whole")
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert len(errors_of(outcome)) == 2
    with pytest.raises(ConfigError, match="is converted already; leave out --to"):
        run(changed(there, to="linear"), tmp_path / "other")
    # a layer that is not taught keeps its mechanism
    part = run(changed(there, layers=(1,)), tmp_path / "part")
    assert len(errors_of(part)) == 1
    run(changed(there, loss="outputs"), tmp_path / "projections")
    with pytest.raises(ConfigError, match="an earlier transfer has trained its projections"):
        run(changed(there, model=str(tmp_path / "projections")), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 13}, ConfigError, r"steps = 13, but the transfer in .* began with 12"),
        ({"length": 32}, ConfigError, "length = 32, but"),
        ({"to": "infini", "fields": {"segment": 8}}, ConfigError, "to = 'infini', but"),
        ({"layers": (0,)}, ConfigError, "already teaches the same layers"),
    ],
)
def test_other_settings_are_refused_in_one_line(
    settings: TransferSettings, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(KeyError):
        run(settings, tmp_path / "out", progress=Stops(5, error=KeyError()), log_every=1)
    with pytest.raises(error, match=message) as raised:
        run(changed(settings, **changes), tmp_path / "out")
    assert "\n" not in str(raised.value)
    # nothing is lost
    run(settings, tmp_path / "whole")
    run(settings, tmp_path / "out")
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def test_changed_text_is_refused(settings: TransferSettings, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text("the people of a union " * 20)
    settings = changed(settings, text=str(tmp_path / "text"))
    with pytest.raises(KeyError):
        run(settings, tmp_path / "out", progress=Stops(5, error=KeyError()), log_every=1)
    (tmp_path / "text" / "b.txt").write_text("other words " * 20)
    with pytest.raises(ConfigError, match="text_digest"):
        run(settings, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "/nowhere"}, CheckpointError, "/nowhere: no such folder or file"),
        ({"to": ""}, ConfigError, "is not converted; choose a mechanism with --to"),
        ({"to": "windw"}, ConfigError, "did you mean 'window'"),
        ({"to": "window", "fields": {"window": 8}}, ConfigError, "no parameters to learn; use loss 'outputs'"),
        ({"to": "infini", "fields": {"segment": 64}}, DataError, "use pieces longer than its segment or window"),
        ({"layers": (0, 7)}, ConfigError, r"layers = \[0, 7\]: must be among the 2 layers 0 to 1"),
        ({"layers": ()}, ConfigError, r"layers = \[\]: must be among"),
        ({"keep_softmax": 2}, ConfigError, "keep_softmax = 2: must be from 0 to 1"),
        ({"layers": "auto:2"}, ConfigError, "must be from auto:1 to auto:1"),
        ({"text": "/nowhere.txt"}, DataError, "/nowhere.txt"),
        ({"dtype": "int8"}, ConfigError, "--dtype 'int8'"),
        ({"lr": 1e30}, LongspanError, "not finite"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(
    settings: TransferSettings, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        run(changed(settings, **changes), tmp_path / "out")
    assert "\n" not in str(raised.value)
    if "lr" in changes:
        # without a checkpoint, settings may change
        assert run(changed(settings, lr=1e-2), tmp_path / "out").step == 12
    else:
        assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(settings: TransferSettings, source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(CheckpointError, match="did not write"):
        run(settings, tmp_path)
    with pytest.raises(CheckpointError, match="contains MODEL itself"):
        run(settings, source)
    with pytest.raises(ConfigError, match=r"transfer.length = 1: must be at least 2"):
        changed(settings, length=1)
    with pytest.raises(ConfigError, match=r"transfer.eval_every = 0: must be at least 1"):
        run(settings, tmp_path / "out", eval_every=0)


def test_names_of_sets_of_layers() -> None:
    names = {None: "all", (3,): "3", (0, 1, 2): "0-2", (0, 1, 5, 7, 8): "0-1,5,7-8"}
    for layers, name in names.items():
        assert transfer_store.part_name(layers) == f"layers-{name}"


def test_displays(settings: TransferSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for progress in ("plain", "live"):
        run(settings, tmp_path / progress, progress=progress, log_every=1, eval_every=5)
        shown = " ".join(capsys.readouterr().err.split())
        assert "2 layers, " in shown
        assert "step " in shown
        assert ("error at the start" if progress == "live" else "relative error") in shown
    with pytest.raises(ConfigError, match="progress = 'loud'"):
        make_transfer_display("loud")
