"""Pieces read every token once per epoch from random offsets, carry nothing, and can stop anywhere."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.test_lanes import lines_of, make

from longspan.errors import CheckpointError, ConfigError, DataError
from longspan.train import Lanes, Pieces, run
from longspan.train.lanes import Batch
from longspan.train.pieces import _join


def pieces_of(batches: Sequence[Batch]) -> list[tuple[int, list[int]]]:
    """Documents and targets of all pieces, row after row, as the resets split the rows."""
    pieces: list[tuple[int, list[int]]] = []
    for batch in batches:
        assert batch.reset is not None
        for row in range(batch.tokens.shape[0]):
            for column in (batch.document[row] >= 0).nonzero().flatten().tolist():
                if batch.reset[row, column]:
                    pieces.append((int(batch.document[row, column]), []))
                pieces[-1][1].append(int(batch.targets[row, column]))
    return pieces


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any),
    lanes=st.integers(1, 5),
    segment=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_token_is_read_once_per_epoch(lengths: list[int], lanes: int, segment: int, seed: int) -> None:
    documents = make(lengths)
    reader = Pieces(documents, lanes=lanes, segment_length=segment, seed=seed, epochs=2)
    assert reader.places_per_epoch == sum(lengths)
    pieces = pieces_of(list(reader))
    for index, length in enumerate(lengths):
        expected = documents[index].cut(0, length).targets.tolist()
        read = [targets for document, targets in pieces if document == index]
        assert sorted(itertools.chain(*read)) == sorted(2 * expected)
        # each piece is a contiguous part; only those at the ends of a document are shorter than a segment
        text = bytes(expected)
        for targets in read:
            first = text.index(bytes(targets))
            assert len(targets) == segment or first == 0 or first + len(targets) == length


def test_offsets_are_uniform() -> None:
    documents = make([60] * 160)
    starts = [documents[index].cut(0, 1).targets[0] for index in range(160)]
    lengths = np.zeros(20, dtype=np.int64)
    for document, targets in pieces_of(list(Pieces(documents, lanes=8, segment_length=20, seed=1, epochs=5))):
        if targets[0] == starts[document]:
            lengths[len(targets) % 20] += 1
    assert lengths.sum() == 800
    # 40 expected per offset, with a deviation of 6.3
    assert 12 < lengths.min() < lengths.max() < 72


def test_epochs_have_offsets_and_an_order_of_their_own() -> None:
    documents = make([100, 130])
    read = pieces_of(list(Pieces(documents, lanes=1, segment_length=10, epochs=2)))
    half = next(count for count in range(len(read)) if sum(len(targets) for _, targets in read[:count]) == 230)
    first, second = read[:half], read[half:]
    assert sorted(first) != sorted(second)
    assert first != sorted(first)
    assert pieces_of(list(Pieces(documents, lanes=1, segment_length=10, epochs=2))) == read


def test_a_short_document_is_one_piece_and_short_pieces_share_rows() -> None:
    (batch,) = Pieces(make([3, 5, 8, 2]), lanes=3, segment_length=8, epochs=1)
    assert batch.reset is not None
    assert batch.mask is not None
    assert sorted(pieces_of([batch])) == [
        (index, make([3, 5, 8, 2])[index].cut(0, length).targets.tolist()) for index, length in enumerate([3, 5, 8, 2])
    ]
    assert sorted(batch.mask.sum(1).tolist()) == [2, 8, 8]
    assert int(batch.reset.sum()) == 4


@given(lengths=st.lists(st.integers(1, 20), max_size=30))
def test_joined_pieces_fit_into_rows(lengths: list[int]) -> None:
    rows = _join(np.array(lengths, dtype=np.int64), 20)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    fill = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= 20 for total in fill)
    # no two rows in succession fit into one
    assert all(left + right > 20 for left, right in itertools.pairwise(fill))


def test_padding_counts_no_loss(recipe: dict[str, Any], tmp_path: Path) -> None:
    batches = list(Pieces(make([30, 31, 7]), lanes=2, segment_length=16, epochs=3))
    padded = [batch for batch in batches if batch.mask is not None]
    assert padded
    for batch in padded:
        assert batch.mask is not None
        assert not batch.graded[~batch.mask].any()
        assert not batch.sizes[~batch.mask].any()
        assert (batch.document[~batch.mask] == -1).all()
    assert sum(int(batch.graded.sum()) for batch in batches) == 3 * 68
    # the tokens of a run are those that were read, without padding
    recipe["train"] |= {"sampling": "pieces", "segment_length": 500, "steps": 3, "eval_every": 0}
    finished = run(recipe, tmp_path, progress="none")
    assert 0 < finished.tokens < 3 * 4 * 500


@given(lanes=st.sampled_from([2, 4, 6]), world=st.sampled_from([1, 2]), segment=st.integers(1, 9))
def test_processes_share_the_rows_of_one(lanes: int, world: int, segment: int) -> None:
    documents = make([5, 0, 33, 12, 2, 9])
    alone = lines_of(Pieces(documents, lanes=lanes, segment_length=segment), 30)
    together = []
    for rank in range(world):
        part = Pieces(documents, lanes=lanes, segment_length=segment, rank=rank, world_size=world)
        together += lines_of(part, 30)
    assert together == alone


@given(stop=st.integers(0, 25))
def test_pieces_continue_from_a_state_of_plain_data(stop: int) -> None:
    documents = make([5, 33, 12, 2, 9, 1])
    whole = Pieces(documents, lanes=3, segment_length=4, seed=5)
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = Pieces(documents, lanes=3, segment_length=4, seed=5)
    resumed.load_state_dict(state)
    for _ in range(20):
        for actual, expected in zip(next(resumed), next(whole), strict=True):
            assert actual is expected is None or torch.equal(actual, expected)  # type: ignore[arg-type]


def test_invalid_rows_and_foreign_states_are_refused() -> None:
    documents = make([9, 9])
    with pytest.raises(ConfigError, match=r"train.lanes = 3: must be a multiple of the number of processes, 2"):
        Pieces(documents, lanes=3, segment_length=4, world_size=2)
    with pytest.raises(DataError, match="no tokens"):
        Pieces(make([0]), lanes=3, segment_length=4)
    state = Pieces(documents, lanes=3, segment_length=4).state_dict()
    with pytest.raises(CheckpointError, match="the training data differs from that of the checkpoint"):
        Pieces(make([9, 10]), lanes=3, segment_length=4).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"train.segment_length = 5, but the checkpoint has pieces of 4 tokens"):
        Pieces(documents, lanes=3, segment_length=5).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"the checkpoint has pieces of None tokens"):
        Pieces(documents, lanes=3, segment_length=4).load_state_dict(
            Lanes(documents, lanes=3, segment_length=4).state_dict()
        )
