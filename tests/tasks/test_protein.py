"""The protein task: families and masks, which are the same every time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan import tasks
from longspan.errors import ConfigError, DataError
from longspan.tasks import ProteinConfig, ProteinTask
from longspan.tasks.base import Array
from longspan.tasks.protein import AMINO_ACIDS, BEGIN, END, FIRST, MASK, VOCABULARY, families, is_amino_acid
from longspan.tasks.sources import PROTEINS


def letters_of(seed: int, count: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list(AMINO_ACIDS), count))


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """60 families of one or two sequences, which share half of their length; one sequence comes twice."""
    lines = []
    for index in range(60):
        one = letters_of(index, 30 + 2 * index)
        lines.append(f">sp|A{index}|X\n{one}")
        if index % 2:
            lines.append(f">sp|B{index}|X\n{letters_of(1000 + index, 12)}{one[: len(one) // 2]}")
    lines += [">sp|AGAIN|X", letters_of(7, 44), ">unknown", "XXXX", ">sp|RARE|X", "XXBZU" + letters_of(99, 40)]
    path = tmp_path / "some.fasta"
    path.write_text("\n".join(lines))
    return path


def task_of(path: Path, **fields: Any) -> ProteinTask:
    return ProteinTask(ProteinConfig(source=str(path), **fields))


def test_families_are_never_split_and_equal_sequences_are_read_once(fasta: Path) -> None:
    task = task_of(fasta, validation_fraction=0.3)
    names = {split: {name for name, _ in task.sequences(split)} for split in ("train", "validation")}
    assert not names["train"] & names["validation"]
    both = names["train"] | names["validation"]
    assert "A7" in both
    assert not {"AGAIN", "unknown"} & both
    assert len(both) == 60 + 30 + 1
    assert 0.2 * len(both) < len(names["validation"]) <= 0.3 * len(both)
    for index in range(1, 60, 2):
        assert (f"A{index}" in names["train"]) == (f"B{index}" in names["train"])
    parted = task_of(fasta, validation_fraction=0.3, family=0)
    apart = {name for name, _ in parted.sequences("train")}
    assert any((f"A{index}" in apart) != (f"B{index}" in apart) for index in range(1, 60, 2))


@pytest.mark.parametrize("stretch", [1, 4, 12])
def test_families_equal_those_of_all_pairs_of_substrings(stretch: int) -> None:
    random = np.random.default_rng(stretch)
    letters = 4 if stretch > 1 else 20
    sequences = [
        (FIRST + random.integers(letters, size=random.integers(1, 30))).astype(np.uint8) for _ in range(24)
    ] + [np.full(3, FIRST + 19, dtype=np.uint8)]
    sequences.append(np.concatenate([sequences[0][-6:], sequences[5][:20]]))

    def parts(ids: Array) -> set[bytes]:
        return {ids[i : i + stretch].tobytes() for i in range(len(ids) - stretch + 1)}

    expected = list(range(len(sequences)))
    for i, left in enumerate(sequences):
        for j, right in enumerate(sequences):
            if parts(left) & parts(right):
                low, high = sorted((expected[i], expected[j]))
                expected = [low if family == high else family for family in expected]
    assert families(sequences, stretch).tolist() == expected


def test_training_masks_8_of_10_and_held_out_residues_are_all_hidden(tmp_path: Path) -> None:
    path = tmp_path / "long.fasta"
    path.write_text("".join(f">s{seed}\n{letters_of(seed, 20_000)}\n" for seed in range(4)))
    task = task_of(path, validation_fraction=0.5, copies=2)
    for split in ("train", "validation"):
        documents = task.documents(split)
        piece = documents[0].cut(0, len(documents[0]))
        assert piece.graded.sum() == 3000
        assert (piece.tokens == piece.targets)[~piece.graded].all(), "residues that are not graded are shown"
        assert (piece.tokens[0], piece.tokens[-1]) == (BEGIN, END)
        shown = piece.tokens[piece.graded]
        if split == "validation":
            assert (shown == MASK).all()
            continue
        hidden = np.mean(shown == MASK)
        right = np.mean(shown == piece.targets[piece.graded])
        assert hidden == pytest.approx(0.8, abs=0.03)
        assert right == pytest.approx(0.1 + 0.1 / 20, abs=0.02)
        assert len(set(shown.tolist())) == 21


def test_copies_are_masked_differently_and_the_same_each_time(fasta: Path) -> None:
    first, second = (task_of(fasta, copies=2).documents("train") for _ in range(2))
    half = len(first) // 2
    assert first.fingerprint == second.fingerprint
    assert first.names[0].removesuffix(":0") == first.names[half].removesuffix(":1")
    whole = first[3].cut(0, len(first[3]))
    assert whole.tokens.tolist() == second[3].cut(0, len(second[3])).tokens.tolist()
    second_copy = first[3 + half].cut(0, len(first[3 + half]))
    assert second_copy.targets.tolist() == whole.targets.tolist()
    assert second_copy.graded.tolist() != whole.graded.tolist()
    for begin in (0, 1, 9):
        for one, part in zip(whole, first[3].cut(begin, 20), strict=True):
            assert one[begin:20].tolist() == part.tolist()
    assert task_of(fasta, copies=2, seed=1).documents("train").fingerprint != first.fingerprint
    assert task_of(fasta, copies=2, share=0.2).documents("train").fingerprint != first.fingerprint


def test_only_amino_acids_are_graded(fasta: Path) -> None:
    task = task_of(fasta)
    documents = [task.documents(split) for split in ("train", "validation")]
    items = {name.split(":")[0]: item for part in documents for name, item in zip(part.names, part.items, strict=True)}
    piece = items["RARE"].cut(0, len(items["RARE"]))
    assert [VOCABULARY[token] for token in piece.targets[1:6]] == list("XXBZU")
    assert not piece.graded[:6].any()
    assert is_amino_acid(piece.targets[piece.graded]).all()
    assert piece.graded.sum() == 6
    assert task.vocab_size == len(VOCABULARY) == 29


def test_frequencies_are_those_of_training(tmp_path: Path) -> None:
    path = tmp_path / "two.fasta"
    path.write_text(">a\nAAAC\n>b\nAAXC\n")
    task = task_of(path, family=0, validation_fraction=0.5)
    ((_, ids),) = task.sequences("train")
    expected = {5: [3 / 4, 1 / 4]}.get(
        len(ids), [3 / 4, 1 / 4] if not (ids == VOCABULARY.index("X")).any() else [2 / 3, 1 / 3]
    )
    assert task.frequencies()[:2] == pytest.approx(expected)
    assert task.frequencies().sum() == pytest.approx(1)


def test_other_sequences_are_masked_as_held_out_ones(fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "other.fa").write_text(">o\n" + letters_of(5, 40))
    (document,) = task_of(fasta).read(str(tmp_path / "other.fa")).items
    piece = document.cut(0, 42)
    assert (piece.tokens[piece.graded] == MASK).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": 13}, "task.family = 13: must be from 0 to 12 consecutive residues"),
        ({"share": 0.0}, "task.share = 0.0: must be greater than 0 and less than 1"),
        ({"validation_fraction": 1.0}, "task.validation_fraction = 1.0: must be greater than 0 and less than 1"),
        ({"copies": 0}, "task.copies = 0: must be at least 1"),
    ],
)
def test_invalid_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProteinConfig(**fields)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.fasta").write_text(">a\nMKTAYIAKQR\n>b\nMKTAYIAKQR\n>c\nXMKTAYIAKQRX\n")
    with pytest.raises(DataError, match=r"2 different sequence\(s\) in 1 families leave none to validate on"):
        task_of(tmp_path / "one.fasta", validation_fraction=0.5).documents("train")


def test_the_task_is_built_by_name(fasta: Path) -> None:
    assert "protein" in tasks.names()
    task = tasks.build({"name": "protein", "source": str(fasta)})
    assert isinstance(task, ProteinTask)
    assert task.unit == "residue"


@pytest.mark.skipif(not any(path.is_file() for path in PROTEINS), reason="needs `make data` on Debian or Ubuntu")
@pytest.mark.long
def test_the_real_proteins_have_their_recorded_frequencies() -> None:
    task = ProteinTask()
    counts = {split: len(task.sequences(split)) for split in ("train", "validation")}
    assert sum(counts.values()) == 18_801
    assert counts["validation"] == 1880
    assert AMINO_ACIDS[task.frequencies().argmax()] == "L"
    assert AMINO_ACIDS[task.frequencies().argmin()] == "W"
    assert task.frequencies().max() == pytest.approx(0.096, abs=0.002)
