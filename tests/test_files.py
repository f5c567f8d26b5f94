from pathlib import Path

import pytest
import torch

import longspan as ls
from longspan.files import read_json, read_tensors, write_atomically, write_json, write_tensors


def test_tensors_round_trip_with_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "t.safetensors", {"a": base, "b": base[:, 1:3], "c": base.T}, {"kind": "test", "n": 3})
    tensors, header = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(tensors["b"], base[:, 1:3])
    assert torch.equal(tensors["c"], base.T)
    assert header == {"kind": "test", "n": 3}


def test_only_shared_tensors_are_copied_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, clone = [], torch.Tensor.clone

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.numel())
        return clone(tensor)

    shared = torch.ones(30)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", counted)
        write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1000), "b": shared, "c": shared}, {})
    assert copied == [30]
    assert read_tensors(tmp_path / "t.safetensors")[0].keys() == {"a", "b", "c"}


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"good": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ls.CheckpointError, match="No space left on device; the earlier file is unchanged"):
        write_atomically(path, fail)
    assert read_json(path) == {"good": 1}
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(ls.CheckpointError, match="no such file"):
        read_tensors(path)
    write_tensors(path, {"a": torch.ones(1000)}, {})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ls.CheckpointError, match="damaged"):
        read_tensors(path)
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ls.CheckpointError, match="was not written by longspan"):
        read_tensors(path)
    with pytest.raises(ls.CheckpointError, match="no such file"):
        read_json(tmp_path / "none.json")


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ls.errors.CheckpointError, match=r"could not be saved: .*check free space and permissions"):
        write_json(tmp_path / "file" / "data.json", {})
