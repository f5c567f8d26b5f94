"""The checks themselves: small mixers that obey the laws pass all of them, and each mutant fails the check named."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings
from torch import nn

from . import mutants as m
from . import quiet_mutants as q
from .checks import CHECKS, causality, contract, cost, definition, gradients, memory, packing, quiet, stream, why_not
from .tiny import FAST, SLOW, Tiny, TinySegments, maker
from .tools import Make


def check_definition(make: Make) -> None:
    definition.check_definition(make, getattr(make(), "module", FAST), SLOW)


def check_definition_of_long_calls(make: Make) -> None:
    definition.check_definition_of_long_calls(make, getattr(make(), "module", FAST), SLOW)


def name_of(check: Callable[[Make], None]) -> str:
    return check.__name__.removeprefix("check_")


BROKEN: list[tuple[Callable[[Make], None], type[nn.Module], dict[str, Any]]] = [
    (contract.check_forms, q.AcceptsState, {}),
    (contract.check_changed_weights, m.KeepsWeights, {}),
    # 1
    (causality.check_causality, m.ChunkMaximum, {}),
    (causality.check_causality_of_long_calls, m.ChunkMaximum, {}),
    (causality.check_causality, m.TopOfTheCall, {}),
    (causality.check_causality, m.RoundedByLaterTokens, {}),
    (causality.check_map_is_causal, m.SeesNext, {}),
    # 2
    (stream.check_cuts, m.CallBorders, {}),
    (stream.check_cuts, m.ForgetsPosition, {}),
    (contract.check_empty_past, m.ZeroKeys, {}),
    (stream.check_token_by_token, m.CallBorders, {}),
    (stream.check_token_by_token, m.ForgetsPosition, {"window": None}),
    (stream.check_token_by_token, m.SinglePrecision, {}),
    (stream.check_saved_state, m.HiddenState, {}),
    (stream.check_moved_state, m.KeepsTheTypeOfThePast, {}),
    (stream.check_moved_state, m.KeepsTheTypeOfThePast, {"window": None}),
    (stream.check_moved_state, m.AccumulatorsSink, {}),
    (stream.check_far_positions, m.SingleAngles, {}),
    (stream.check_far_positions, m.AnglesOfTheModel, {}),
    (stream.check_far_positions, m.AnglesOfTheModel, {"window": None}),
    # 3
    (memory.check_bytes, m.ForgetsCounts, {}),
    (memory.check_bytes, m.ForgetsCounts, {"window": None}),
    (memory.check_bytes, m.OneDtype, {}),
    (memory.check_bytes, m.HoldsDeadColumns, {"window": None}),
    (memory.check_capacity, m.KeepsTheCallAlive, {}),
    (memory.check_growing_columns, m.HoldsDeadColumns, {"window": None}),
    (memory.check_growing_columns, m.PadsBehind, {"window": None}),
    (memory.check_given_state_is_kept, m.WritesInPlace, {}),
    (memory.check_given_state_is_kept, m.CountsInPlace, {}),
    (memory.check_given_state_is_kept, m.HiddenState, {}),
    (memory.check_interrupted_calls, m.OwnsInPlace, {}),
    # 4
    (check_definition, m.OneTooFar, {}),
    (check_definition, m.ColdKeys, {}),
    (check_definition, m.OwnOp, {}),
    (check_definition, m.ShortcutInEvaluation, {}),
    (check_definition_of_long_calls, m.OneTooFar, {}),
    (check_definition_of_long_calls, m.ColdKeys, {}),
    # 5
    (packing.check_padding, m.PaddingCounts, {}),
    (packing.check_padding, m.PaddingNormalizes, {}),
    (packing.check_padding, m.PaddingSpeaks, {}),
    (packing.check_documents, m.ResetLeaks, {}),
    (packing.check_carried_state, m.ResetLeaks, {}),
    (packing.check_documents, m.ResetOnRealTokensOnly, {}),
    (packing.check_ragged_calls, m.LateReset, {}),
    (packing.check_ragged_calls, m.CallBorders, {}),
    (packing.check_long_rows, m.PaddingCounts, {}),
    (packing.check_blank_rows, m.LateReset, {}),
    (packing.check_blank_rows, m.NothingIsNaN, {}),
    (packing.check_blank_rows, m.BlankRowAges, {}),
    (packing.check_bidirectional, m.BidirectionalLeak, {}),
    (packing.check_bidirectional, m.NothingIsNaN, {}),
    (packing.check_padding_gradients, m.GradientOfPadding, {}),
    # 6
    (gradients.check_gradients_of_cuts, m.StopsAtCalls, {}),
    (gradients.check_numeric_gradients, m.CutEverywhere, {}),
    (gradients.check_gradients_of_cuts, m.CutInsideSegment, {"horizon": 1}),
    (gradients.check_gradients_of_open_segment, m.CutInsideSegment, {"horizon": 1}),
    (gradients.check_reach, m.NoCut, {"horizon": 1}),
    (gradients.check_reach, m.NoCut, {"horizon": 2}),
    (gradients.check_reach, m.OneSegmentFurther, {"horizon": 2}),
    (gradients.check_reach, m.CutEverywhere, {"horizon": 2}),
    (gradients.check_reach, m.CutEverywhere, {"horizon": 3}),
    (gradients.check_numeric_gradients, m.WrongBackward, {}),
    (gradients.check_detach, m.KeepsGraph, {}),
    (gradients.check_every_parameter, m.UnusedWhenShort, {}),
    # 7
    (cost.check_flops, m.FivePercent, {}),
    (cost.check_flops, m.TriangleOnly, {}),
    (cost.check_pairs, m.OneHead, {}),
    # 8
    (quiet.check_rows_are_independent, q.RowMaximumOfBatch, {}),
    (quiet.check_batch_size, q.MeanOfBatch, {}),
    (quiet.check_bf16_streams, q.HalfAccumulator, {}),
    (quiet.check_autocast, q.AutocastAccumulator, {}),
    (quiet.check_old_streams, q.GrowsWithAge, {}),
    (quiet.check_large_inputs, q.NoMaximum, {}),
    (quiet.check_draws_nothing, q.Draws, {}),
    (quiet.check_draws_nothing, q.DropsInEvaluation, {}),
    (quiet.check_forward_changes_nothing, q.WritesBuffer, {}),
    (quiet.check_forward_changes_nothing, q.ClampsParameter, {}),
    (quiet.check_forward_changes_nothing, q.LossOnModule, {}),
    (quiet.check_empty_inputs, q.MeanOfNothing, {}),
]

# What the mutants are derived from, with the check that each mutant fails.
LAWFUL = {
    f"{name_of(check)}-{base.__name__}-{fields}": (check, base, fields)
    for check, mutant, fields in BROKEN
    for base in [next(base for base in (q.SlowMemory, TinySegments, Tiny) if issubclass(mutant, base))]
}


@pytest.fixture(autouse=True)
def no_shrinking() -> Iterator[None]:
    """A mutant need not fail on the smallest example."""
    settings.register_profile("mutants", settings.get_profile("laws"), phases=[Phase.generate])
    settings.load_profile("mutants")
    yield
    settings.load_profile("laws")


@pytest.mark.parametrize(
    ("check", "mutant", "fields"), BROKEN, ids=[f"{name_of(c)}-{b.__name__}-{i}" for i, (c, b, _) in enumerate(BROKEN)]
)
def test_mutant_fails(check: Callable[[Make], None], mutant: type[nn.Module], fields: dict[str, Any]) -> None:
    make = maker(mutant, **fields)
    assert check in (check_definition, check_definition_of_long_calls) or not why_not(check, make())
    with pytest.raises(AssertionError):
        check(make)


@pytest.mark.parametrize(
    ("mutant", "reason"), [(m.OneTooFar, "outputs"), (m.ColdKeys, "gradient of"), (m.OwnOp, "calls no op")]
)
def test_mutant_of_law_4_fails_for_its_reason(mutant: type[nn.Module], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_definition(maker(mutant))


@pytest.mark.parametrize(("check", "lawful", "fields"), LAWFUL.values(), ids=LAWFUL)
def test_lawful_passes(check: Callable[[Make], None], lawful: type[nn.Module], fields: dict[str, Any]) -> None:
    check(maker(lawful, **fields))


def test_every_check_has_a_mutant() -> None:
    tested = {name_of(check) for check, _, _ in BROKEN}
    tested |= {"traits", "state_is_of_tensors", "state_functions"}  # the contract's shape, and longspan.state itself
    assert tested == {name_of(check) for checks in CHECKS.values() for check in checks}
