"""A changed byte in a state or in a model is noticed; files of earlier versions, without digests, still load."""

import json
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from tests.cli.command import Command
from tests.field.models import CONVERTIBLE, NAMES, converted, own, tokens
from tests.field.test_start_of_a_run import CURRICULUM
from tests.field.test_work_is_kept import recipe_of
from tests.hf.conftest import save_llama

import longspan as ls
from longspan.errors import CheckpointError
from longspan.files import HEADER, read_tensors
from longspan.train import checkpoint as checkpoints
from longspan.train import load_run, read_log, run


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def offsets_of(path: Path) -> list[int]:
    """Offsets of the first, the middle and the last byte of the tensors."""
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    size = path.stat().st_size
    return [8 + length, (8 + length + size) // 2, size - 1]


def without_digest(path: Path) -> None:
    """As earlier versions wrote the file."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.pop("config", None)
    safetensors.torch.save_file(tensors, path, {HEADER: json.dumps(header)})


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_in_a_state(name: str, tmp_path: Path) -> None:
    model = own(name)
    state = model(tokens(2, 11))[1]
    path = ls.state.save(tmp_path / "state", state)
    for offset in offsets_of(path):
        flip(path, offset)
        with pytest.raises(CheckpointError, match="damaged"):
            ls.state.load(path, like=model.init_state(1))
        flip(path, offset)
    without_digest(path)
    actual, _ = ls.state.load(path, like=model.init_state(1))
    expected = ls.state.tensors(state)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ls.state.tensors(actual).items())


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_flipped_byte_in_the_session_of_a_converted_model(name: str, tmp_path: Path) -> None:
    from longspan.hf.decoder import ConvertedDecoder

    model = ConvertedDecoder(converted(name))
    if not model.traits.streams:
        pytest.skip("no state")
    session = ls.StreamSession(model)
    session.feed([1, 2, 3, 4, 5])
    path = session.save(tmp_path / "state")
    flip(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="damaged"):
        ls.StreamSession.load(model, path)


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = ls.state.save(tmp_path / "state", own("window").init_state(1))
    expected = read_tensors(path)
    noticed = 0
    size = path.stat().st_size
    for offset in range(size):
        flip(path, offset)
        try:
            actual = read_tensors(path)
        except CheckpointError:
            noticed += 1
        else:
            # white space around JSON, at most
            assert actual[1] == expected[1]
            assert all(torch.equal(actual[0][name], value) for name, value in expected[0].items())
        flip(path, offset)
    assert noticed >= size - 8


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_flipped_byte_in_a_saved_model(tmp_path: Path, file: str) -> None:
    ls.save_model(own("window"), tmp_path)
    if file == "config.json":
        # still a configuration, of another model of the same shapes
        path = tmp_path / file
        path.write_text(path.read_text().replace('"window": 4', '"window": 5'))
    else:
        flip(tmp_path / file, -1)
    with pytest.raises(CheckpointError, match="damaged"):
        ls.load_model(tmp_path)


def test_a_model_of_an_earlier_version_loads(tmp_path: Path) -> None:
    model = own("window")
    ls.save_model(model, tmp_path)
    without_digest(tmp_path / "model.safetensors")
    assert torch.equal(ls.load_model(tmp_path)(tokens(1, 9))[0], model(tokens(1, 9))[0])


@pytest.mark.parametrize("staged", [False, True])
def test_a_flipped_byte_in_the_model_of_a_run(folder: Path, tmp_path: Path, staged: bool) -> None:
    run(CURRICULUM if staged else recipe_of(folder), tmp_path, progress="none")
    for path in sorted((tmp_path / "model").iterdir()):
        flip(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=r"damaged|missing"):
            load_run(tmp_path)
        flip(path, path.stat().st_size // 2)
    (tmp_path / "model" / "digests.json").unlink()
    without_digest(tmp_path / "model" / "model.safetensors")
    assert load_run(tmp_path)[0].config.dim == 16


def test_a_model_saved_over_that_of_a_run_is_that_of_the_run(folder: Path, tmp_path: Path) -> None:
    run(recipe_of(folder), tmp_path, progress="none")
    model, _ = load_run(tmp_path)
    ls.save_model(model, tmp_path / "model")
    assert load_run(tmp_path)[0].config.dim == 16


@pytest.mark.parametrize("file", ["recipe.json", "tokenizer.json"])
def test_a_flipped_byte_in_the_files_of_a_run(folder: Path, tmp_path: Path, file: str) -> None:
    run(recipe_of(folder), tmp_path, progress="none")
    path = tmp_path / file
    for offset in range(0, path.stat().st_size, max(path.stat().st_size // 7, 1)):
        flip(path, offset)
        for call in (lambda: load_run(tmp_path), lambda: run(None, tmp_path, resume=True, progress="none")):
            with pytest.raises(CheckpointError, match=f"{file}: damaged"):
                call()
        flip(path, offset)
    # of earlier versions, and where a user changed a file on purpose
    (tmp_path / "digests.json").unlink()
    assert load_run(tmp_path)[0].config.dim == 16
    assert run({"train": {"steps": 5}}, tmp_path, resume=True, progress="none").step == 5
    flip(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{file}: damaged"):
        load_run(tmp_path)


def test_a_flipped_byte_anywhere_in_what_a_checkpoint_says_of_itself(folder: Path, tmp_path: Path) -> None:
    run(recipe_of(folder), tmp_path, progress="none")
    (newest,) = checkpoints.list_checkpoints(tmp_path / "checkpoints")
    path = newest / "meta.json"
    written = path.read_bytes()
    expected = checkpoints.check(newest)
    noticed = 0
    for offset in range(len(written)):
        flip(path, offset)
        try:
            # white space between words, at most
            assert checkpoints.check(newest) == expected
        except CheckpointError:
            noticed += 1
        flip(path, offset)
    assert noticed > 0.7 * len(written)
    data = json.loads(written)
    del data["digest"]
    path.write_text(json.dumps(data))
    assert checkpoints.check(newest) == expected


@pytest.mark.parametrize("verb", ["stream", "eval", "generate", "train"])
def test_a_flipped_byte_in_a_folder_that_convert_wrote(
    longspan: Command, folder: Path, tmp_path: Path, verb: str
) -> None:
    save_llama(tmp_path / "plain")
    out = tmp_path / "converted"
    assert longspan("convert", tmp_path / "plain", "--to", "window", "-o", out).code == 0
    text = folder / "long.txt"
    arguments = {
        "stream": ["stream", out, text, "--limit", "50"],
        "eval": ["eval", out, text, "--tokens", "20"],
        "generate": ["generate", out, "-p", "x", "-n", "1"],
        "train": ["train", "pretrained", "--set", f"model.source={out}", "-o", tmp_path / "run"],
    }[verb]
    files = sorted(path for path in out.iterdir() if path.name != "digests.json")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        flip(path, path.stat().st_size // 2)
        assert f"{path}: damaged" in longspan(*arguments).error
        flip(path, path.stat().st_size // 2)
    if verb != "train":
        assert longspan(*arguments).code == 0


def test_a_damaged_line_of_a_log_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(4)]
    for damaged in (good[1][:-4], b"\xff" + good[1], b"[1]", good[1].replace(b"step", b"stap"), b"", b"3"):
        path.write_bytes(b"\n".join([good[0], damaged, *good[2:], good[3][:9]]))
        assert [line["step"] for line in read_log(path)] == [0, 2, 3]


@pytest.mark.parametrize("verb", ["eval", "stream", "generate", "convert"])
@pytest.mark.parametrize("file", ["config.json", "recipe.json"])
@pytest.mark.parametrize("text", ["[1]", "[1", "3"])
def test_json_that_is_not_an_object(
    longspan: Command, folder: Path, tmp_path: Path, verb: str, file: str, text: str
) -> None:
    """A file of another application in a folder of the same name."""
    path = tmp_path / "model" / file
    path.parent.mkdir()
    path.write_text(text)
    arguments = {
        "eval": ["eval", path.parent, folder / "long.txt"],
        "stream": ["stream", path.parent, folder / "long.txt"],
        "generate": ["generate", path.parent, "-p", "x"],
        "convert": ["convert", path.parent, "--to", "window", "-o", tmp_path / "out"],
    }[verb]
    assert str(path.parent) in longspan(*arguments).error
