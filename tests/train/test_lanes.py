"""Lanes read every token once, contiguously, and can stop anywhere."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import CheckpointError, ConfigError, DataError
from longspan.tasks import Documents
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes
from longspan.train import Batch, Lanes


def make(lengths: Sequence[int]) -> Documents:
    """Documents whose bytes differ by document and place."""
    items = [
        TextDocument((np.arange(length) * 7 + 31 * index + 1).astype(np.uint8), Bytes())
        for index, length in enumerate(lengths)
    ]
    return Documents(items, [str(i) for i in range(len(items))], str(lengths))


def lines_of(lanes: Iterator[Batch], count: int | None = None) -> list[list[tuple[int, int, int, bool]]]:
    """A list of (document, token, target, reset) per lane."""
    lines: list[list[tuple[int, int, int, bool]]] = []
    for number, batch in enumerate(lanes):
        lines = lines or [[] for _ in range(batch.tokens.shape[0])]
        real = torch.ones_like(batch.graded) if batch.mask is None else batch.mask
        reset = torch.zeros_like(real) if batch.reset is None else batch.reset
        for row, line in enumerate(lines):
            columns = (batch.document, batch.tokens, batch.targets, reset)
            line += list(zip(*(column[row][real[row]].tolist() for column in columns), strict=True))
        if number + 1 == count:
            break
    return lines


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any),
    lanes=st.integers(1, 5),
    segment=st.integers(1, 9),
    seed=st.none() | st.integers(0, 3),
    cut=st.booleans(),
)
def test_everything_is_read_once_and_contiguously(
    lengths: list[int], lanes: int, segment: int, seed: int | None, cut: bool
) -> None:
    documents = make(lengths)
    reader = Lanes(documents, lanes=lanes, segment_length=segment, seed=seed, epochs=1, cut_long=cut)
    assert reader.places_per_epoch == sum(lengths)
    read: dict[int, list[int]] = {index: [] for index in range(len(lengths))}
    for line in lines_of(reader):
        before: tuple[int, int, int] | None = None
        for document, token, target, reset in line:
            # without a reset a place follows the one before it in the same document
            assert reset or (before is not None and (document, token) == (before[0], before[2]))
            read[document].append(target)
            before = (document, token, target)
    for index, length in enumerate(lengths):
        expected = documents[index].cut(0, length).targets.tolist()
        assert sorted(read[index]) == sorted(expected)


@given(lanes=st.sampled_from([2, 4, 6]), world=st.sampled_from([1, 2]), segment=st.integers(1, 9))
def test_processes_share_the_lanes_of_one(lanes: int, world: int, segment: int) -> None:
    documents = make([5, 0, 33, 12, 2, 9])
    alone = lines_of(Lanes(documents, lanes=lanes, segment_length=segment), 30)
    together = []
    for rank in range(world):
        part = Lanes(documents, lanes=lanes, segment_length=segment, rank=rank, world_size=world)
        together += lines_of(part, 30)
    assert together == alone


@given(lengths=st.lists(st.integers(0, 30), min_size=8, max_size=20), world=st.integers(2, 4), seed=st.integers(0, 3))
def test_processes_read_disjoint_places_that_are_all_there_are(lengths: list[int], world: int, seed: int) -> None:
    documents = make([*lengths, 5, 50])
    read = []
    for rank in range(world):
        part = Lanes(
            documents,
            lanes=2 * world,
            segment_length=4,
            seed=seed,
            epochs=1,
            rank=rank,
            world_size=world,
            cut_long=False,
        )
        pairs = [(document, target) for line in lines_of(part) for document, _, target, _ in line]
        read.append({document: [pair[1] for pair in pairs if pair[0] == document] for document, _ in pairs})
    # no document is read by two processes, and together they read all of every document
    assert sum(len(targets_of) for targets_of in read) == len(set().union(*read)) == np.count_nonzero(documents.lengths)
    for targets_of in read:
        for document, targets in targets_of.items():
            assert targets == documents[document].cut(0, len(documents[document])).targets.tolist()


@given(stop=st.integers(0, 25))
def test_lanes_continue_from_a_state_of_plain_data(stop: int) -> None:
    documents = make([5, 33, 12, 2, 9, 1])
    whole = Lanes(documents, lanes=3, segment_length=4, seed=5)
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = Lanes(documents, lanes=3, segment_length=4, seed=5)
    resumed.load_state_dict(state)
    assert lines_of(resumed, 20) == lines_of(whole, 20)


def test_each_epoch_has_an_order_of_its_own() -> None:
    documents = make([4] * 12)
    read = lines_of(Lanes(documents, lanes=1, segment_length=4), 36)[0]
    epochs = [[line[0] for line in read[first : first + 48 : 4]] for first in (0, 48, 96)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    again = lines_of(Lanes(documents, lanes=1, segment_length=4), 36)[0]
    assert again == read


def test_one_long_book_is_shared_by_all_lanes() -> None:
    batch = next(Lanes(make([1000]), lanes=4, segment_length=8))
    starts = {tuple(row) for row in batch.targets.tolist()}
    assert len(starts) == 4
    assert batch.mask is None
    assert batch.reset is not None
    assert batch.reset[:, 0].all()


def test_reset_and_mask_are_left_out_where_they_say_nothing() -> None:
    reader = Lanes(make([20]), lanes=1, segment_length=8, epochs=1)
    first, second, third = reader
    assert first.reset is not None
    assert third.mask is not None
    assert first.reset.tolist() == [[True] + [False] * 7]
    assert (first.mask, second.reset, second.mask) == (None, None, None)
    assert third.mask.tolist() == [[True] * 4 + [False] * 4]
    assert third.graded.tolist() == third.mask.tolist()
    assert third.sizes.sum() == 4
    assert third.document.tolist() == [[0] * 4 + [-1] * 4]


def test_restart_resets_within_documents() -> None:
    batch = next(Lanes(make([20]), lanes=1, segment_length=20, restart=8))
    assert batch.reset is not None
    assert batch.reset[0].nonzero().flatten().tolist() == [0, 8, 16]


def test_lanes_can_read_the_longest_documents_first() -> None:
    reader = Lanes(make([3, 9, 5]), lanes=3, segment_length=9, seed=None, epochs=1, longest_first=True, cut_long=False)
    assert next(reader).document.tolist() == [[1] * 9, [2] * 5 + [0] * 3 + [-1], [-1] * 9]


def test_invalid_lanes_and_foreign_states_are_refused() -> None:
    documents = make([9, 9])
    with pytest.raises(ConfigError, match=r"train.lanes = 3: must be a multiple of the number of processes, 2"):
        Lanes(documents, lanes=3, segment_length=4, world_size=2)
    with pytest.raises(DataError, match="no tokens"):
        Lanes(make([0]), lanes=3, segment_length=4)
    state = Lanes(documents, lanes=3, segment_length=4).state_dict()
    with pytest.raises(CheckpointError, match="the training data differs from that of the checkpoint"):
        Lanes(make([9, 10]), lanes=3, segment_length=4).load_state_dict(state)
    state["places"].append([0, 0])
    with pytest.raises(CheckpointError, match=r"train\.lanes = 3, but the checkpoint has 4 lanes"):
        Lanes(documents, lanes=3, segment_length=4).load_state_dict(state)
