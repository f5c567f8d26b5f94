"""The verbs on a small run: what they print, that streams can be cut anywhere, that seeds repeat."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.cli.command import Command, Outcome

from longspan.cli.reading import LONGEST, PIECE, SubwordEncoder
from longspan.tasks import TextTask
from longspan.tasks.tokenizers import Tokenizer
from longspan.train import load_run


def stream(
    longspan: Command, run: Path, *arguments: object, tmp_path: Path, stdin: bytes = b""
) -> tuple[NDArray[np.float32], Outcome]:
    """Losses of a stream, and its outcome."""
    file = tmp_path / "losses"
    outcome = longspan("stream", run, *arguments, "--losses", file, stdin=stdin)
    assert outcome.code == 0, outcome
    return np.fromfile(file, dtype="<f4"), outcome


def tokenizer_of(run: Path) -> Tokenizer:
    _, task = load_run(run)
    assert isinstance(task, TextTask)
    return task.tokenizer


def test_train_says_what_to_do_next(longspan: Command, folder: Path, tmp_path: Path) -> None:
    outcome = longspan("train", folder / "bytes.toml", "--set", "train.steps=2", "-o", tmp_path / "run")
    assert outcome.code == 0
    assert "2 steps, 128 tokens" in outcome.out
    assert f"longspan eval {tmp_path / 'run'}" in outcome.out
    resumed = longspan("train", "--resume", "--set", "train.steps=4", "-o", tmp_path / "run")
    assert resumed.code == 0
    assert "4 steps, 256 tokens" in resumed.out


def test_train_starts_from_the_weights_of_a_run(
    longspan: Command, folder: Path, byte_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "2026").symlink_to(byte_run)  # a name that TOML would read as a number
    arguments = ("train", folder / "bytes.toml", "--set", "train.steps=1", "-o", tmp_path / "run")
    outcome = longspan(*arguments, "--init", tmp_path / "2026")
    assert outcome.code == 0
    summary = json.loads((tmp_path / "run" / "init.json").read_text())
    assert (summary["start"], summary["new"], summary["left_over"]) == (str(tmp_path / "2026"), [], [])
    outcome = longspan(*arguments[:-1], tmp_path / "missing", "--init", "2026")
    assert outcome.code == 2
    assert "train.init = '2026': there is no such folder" in outcome.err


def test_eval_prints_both_and_the_difference(longspan: Command, byte_run: Path) -> None:
    outcome = longspan("eval", byte_run)
    assert outcome.code == 0
    for words in ("with memory", "without memory", "difference", "[", "2 documents, 3,000 bytes"):
        assert words in outcome.out


def test_eval_as_json_agrees_with_a_stream(longspan: Command, byte_run: Path, folder: Path, tmp_path: Path) -> None:
    figures = json.loads(longspan("eval", byte_run, folder / "long.txt", "--json").out)
    losses, _ = stream(longspan, byte_run, folder / "long.txt", tmp_path=tmp_path)
    bits = losses.astype(np.float64).mean() / np.log(2)
    assert figures["with_memory"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert figures["with_memory"]["interval"]["low"] is None
    assert figures["without_memory"]["bits_per_byte"] != figures["with_memory"]["bits_per_byte"]


def test_eval_of_each_branch(longspan: Command, folder: Path, byte_run: Path, tmp_path: Path) -> None:
    infini = 'model.mixers=[{name="infini", segment=8, gate_init=0.0}]'
    assert longspan("train", folder / "bytes.toml", "--set", infini, "-o", tmp_path / "run").code == 0
    figures = json.loads(longspan("eval", tmp_path / "run", "--branches", "--json").out)
    losses = {name: figures[name]["bits_per_byte"] for name in ("with_memory", "local_attention_alone", "memory_alone")}
    assert len(set(losses.values())) == 3
    for name in ("local_attention_alone", "memory_alone"):
        more = losses[name] - losses["with_memory"]
        assert figures[name]["difference"]["value"] == pytest.approx(more, abs=1e-6)
    table = longspan("eval", tmp_path / "run", "--branches").out
    assert "memory alone: difference" in table
    outcome = longspan("eval", byte_run, "--branches")
    assert outcome.code == 2
    assert "no layer of this model mixes local attention and a memory" in outcome.err


def test_eval_of_the_starts_of_documents(longspan: Command, byte_run: Path) -> None:
    figures = json.loads(longspan("eval", byte_run, "--head", 100, "--json").out)
    assert figures["documents"] == 2
    assert figures["with_memory"]["tokens"] == 200
    assert json.loads(longspan("eval", byte_run, "--tokens", 70, "--json").out)["with_memory"]["tokens"] == 70


def test_eval_with_another_memory(longspan: Command, byte_run: Path) -> None:
    def bits(*arguments: str) -> Any:
        return json.loads(longspan("eval", byte_run, "--json", *arguments).out)["with_memory"]["bits_per_byte"]

    usual = bits()
    assert bits("--set", "model.mixers.0.cache=kv") == pytest.approx(usual, rel=1e-6)
    none = json.loads(longspan("eval", byte_run, "--json").out)["without_memory"]["bits_per_byte"]
    assert bits("--set", "model.mixers.0.mem_len=0") == pytest.approx(none, rel=1e-6)


def test_a_file_and_standard_input_are_the_same(
    longspan: Command, byte_run: Path, folder: Path, tmp_path: Path
) -> None:
    text = (folder / "long.txt").read_bytes()
    from_file, outcome = stream(longspan, byte_run, folder / "long.txt", tmp_path=tmp_path)
    from_input, _ = stream(longspan, byte_run, "-", tmp_path=tmp_path, stdin=text)
    assert len(from_file) == 9000
    np.testing.assert_array_equal(from_file, from_input)
    assert "9,000 bytes, 9,000 tokens" in outcome.out


@pytest.mark.parametrize("settings", [[], ["--set", "model.mixers.0.cache=kv"]])
def test_a_saved_state_continues_bit_for_bit(
    longspan: Command, byte_run: Path, folder: Path, tmp_path: Path, settings: list[str]
) -> None:
    text, state = folder / "long.txt", tmp_path / "state"
    whole, _ = stream(longspan, byte_run, text, *settings, "--save-at", 4001, "--save-state", state, tmp_path=tmp_path)
    rest, _ = stream(longspan, byte_run, text, *settings, "--load-state", state, "--skip", 4001, tmp_path=tmp_path)
    np.testing.assert_array_equal(whole[4001:].view(np.uint32), rest.view(np.uint32))


def test_saving_at_the_end_prints_how_to_continue(
    longspan: Command, byte_run: Path, folder: Path, tmp_path: Path
) -> None:
    text, state = folder / "long.txt", tmp_path / "state"
    whole, _ = stream(longspan, byte_run, text, tmp_path=tmp_path)
    first, outcome = stream(longspan, byte_run, text, "--limit", 4001, "--save-state", state, tmp_path=tmp_path)
    assert f"--load-state {state}" in outcome.err
    assert "--skip 4001" in outcome.err
    second, _ = stream(longspan, byte_run, text, "--load-state", state, "--skip", 4001, tmp_path=tmp_path)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, rtol=1e-4, atol=1e-5)


def test_the_first_byte_is_predicted_too(longspan: Command, byte_run: Path, tmp_path: Path) -> None:
    losses, _ = stream(longspan, byte_run, "-", tmp_path=tmp_path, stdin=b"t")
    model, _ = load_run(byte_run)
    with torch.no_grad():
        logits, _ = model(torch.tensor([[tokenizer_of(byte_run).begin]]))
    expected = torch.nn.functional.cross_entropy(logits[0], torch.tensor([ord("t")]))
    assert losses.tolist() == pytest.approx([float(expected)])


def test_an_empty_text(longspan: Command, byte_run: Path) -> None:
    outcome = longspan("stream", byte_run, "-", stdin=b"")
    assert outcome.code == 0
    assert "the input is empty" in outcome.err


def test_the_log_holds_every_block(longspan: Command, byte_run: Path, folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "sub" / "log.jsonl"
    losses, _ = stream(
        longspan, byte_run, folder / "long.txt", "--log", log, "--block", 2000, "--skip", 1000, tmp_path=tmp_path
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["bytes"] for line in lines] == [2000, 4000, 6000, 8000]
    assert [line["position"] for line in lines] == [2001, 4001, 6001, 8001]
    bits = losses[2000:4000].astype(np.float64).mean() / np.log(2)
    assert lines[1]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert len({line["state_bytes"] for line in lines}) == 1
    assert all(line["peak"] >= line["resident"] > 1 << 20 for line in lines if line["resident"])


def test_subwords_are_counted_in_bytes(longspan: Command, subword_run: Path, folder: Path, tmp_path: Path) -> None:
    losses, outcome = stream(longspan, subword_run, folder / "long.txt", "--block", 700, tmp_path=tmp_path)
    assert len(losses) < 9000
    assert f"9,000 bytes, {len(losses):,} tokens" in outcome.out
    figures = json.loads(longspan("eval", subword_run, folder / "long.txt", "--json").out)
    bits = losses.astype(np.float64).sum() / 9000 / np.log(2)
    assert figures["with_memory"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_subwords_of_a_stream_are_those_of_the_whole_text(subword_run: Path) -> None:
    tokenizer = tokenizer_of(subword_run)
    text = ("peace with all nätions\n" * 9000 + "and a tail that ends in no newline").encode()
    encoder = SubwordEncoder(tokenizer, "text")
    tokens: list[int] = []
    for first in range(0, len(text), 4999):
        tokens += encoder.push(text[first : first + 4999]).tolist()
        assert encoder.held_back < 2 * PIECE
    tokens += encoder.flush().tolist()
    assert tokens == tokenizer.encode(text).tolist()


def test_subwords_of_a_text_without_newlines_stay_bounded(subword_run: Path) -> None:
    tokenizer = tokenizer_of(subword_run)
    encoder = SubwordEncoder(tokenizer, "text")
    tokens: list[int] = []
    text = b"peace " * 60_000
    for first in range(0, len(text), 50_000):
        tokens += encoder.push(text[first : first + 50_000]).tolist()
        assert encoder.held_back < LONGEST + 50_000
    tokens += encoder.flush().tolist()
    assert tokenizer.decode(tokens) == text


def test_generate_repeats_with_its_seed(longspan: Command, byte_run: Path) -> None:
    first = longspan("generate", byte_run, "--prompt", "the people ", "--tokens", 40)
    assert first.code == 0
    assert 1 <= len(first.out) <= 40
    assert longspan("generate", byte_run, "--prompt", "the people ", "--tokens", 40).out == first.out
    reseeded = longspan("generate", byte_run, "--prompt", "the people ", "--tokens", 40, "--seed", 1)
    assert reseeded.out != first.out
    echoed = longspan("generate", byte_run, "--prompt", "the people ", "--tokens", 40, "--echo")
    assert echoed.out == "the people " + first.out


def test_generate_from_a_file_a_text_and_a_state(longspan: Command, byte_run: Path, tmp_path: Path) -> None:
    text, state = "the people of this union ", tmp_path / "state"
    (tmp_path / "prompt").write_text(text)
    options = ["--tokens", 30, "--temperature", 0]
    expected = longspan("generate", byte_run, "--prompt", text, *options).out
    assert longspan("generate", byte_run, "--prompt-file", tmp_path / "prompt", *options).out == expected
    assert longspan("generate", byte_run, "--prompt-file", "-", *options, stdin=text.encode()).out == expected
    longspan("stream", byte_run, tmp_path / "prompt", "--save-state", state)
    assert longspan("generate", byte_run, "--load-state", state, *options).out == expected
    half = longspan("generate", byte_run, "--prompt", text, "-n", 15, "--temperature", 0, "--save-state", state)
    rest = longspan("generate", byte_run, "--load-state", state, "-n", 15, "--temperature", 0)
    assert half.out + rest.out == expected


def test_generate_with_subwords(longspan: Command, subword_run: Path) -> None:
    outcome = longspan("generate", subword_run, "--prompt", "the people ", "--tokens", 10, "--top-k", 5, "--top-p", 1)
    assert outcome.code == 0
    assert outcome.out


def test_ctrl_c_saves_the_state_of_a_stream(byte_run: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = [sys.executable, "-m", "longspan.cli", "stream", str(byte_run), "-", f"--save-state={state}"]
    log = tmp_path / "log"
    with subprocess.Popen(
        [*command, f"--log={log}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"the people of this union")
        process.stdin.flush()
        until = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < until:
            time.sleep(0.002)
        assert log.read_text(), "nothing was read within a minute"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"--skip 24" in error
    assert state.is_file()


def test_a_run_of_pass_keys_is_evaluated_by_length(longspan: Command, tmp_path: Path) -> None:
    recipe, folder = tmp_path / "keys.toml", tmp_path / "keys"
    recipe.write_text(
        """
        [model]
        dim = 16
        num_layers = 1
        mixers = [{ name = "infini", segment = 32 }]
        [task]
        name = "passkey"
        length = 400
        [train]
        curriculum = "passkey"
        steps = 2
        """
    )
    outcome = longspan("train", recipe, "-o", folder)
    assert outcome.code == 0
    assert f"longspan eval {folder}" in outcome.out
    assert "longspan stream" not in outcome.out
    outcome = longspan("eval", folder, "--lengths", "300,500", "--count", "21", "--json")
    records = json.loads(outcome.out)
    assert [record["length"] for record in records] == [300, 500]
    assert all(record["n"] == 21 for record in records)
    for wrong in ("many", "²", "300,"):
        outcome = longspan("eval", folder, "--lengths", wrong)
        assert outcome.code == 2
        assert f"--lengths '{wrong}'" in outcome.err
    for options in (["--task", "lm"], ["--split", "test"], ["--tokens", 9], ["--head", 9], ["--segment", 9]):
        refused = longspan("eval", folder, *options).error
        assert refused.endswith(
            f"generates its own texts and takes --lengths, --count and --set only; leave out {options[0]}"
        )
    changed = longspan("eval", folder, "--lengths", "300", "--json", "--set", "model.mixers.0.segment=16")
    assert json.loads(changed.out)[0]["length"] == 300
    assert "unknown field 'nothing'" in longspan("eval", folder, "--set", "model.mixers.0.nothing=16").error
