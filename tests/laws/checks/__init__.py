"""One function per demand of a law: `check(make)` raises AssertionError, saying what, where a mixer breaks it.

`CHECKS` lists them by law. Which mixers a check is for follows from the traits alone (`runs`).
"""

from collections.abc import Callable

from torch import nn

from ..tools import Make, trains
from . import causality, contract, cost, definition, gradients, memory, packing, quiet, stream

CHECKS: dict[str, tuple[Callable[[Make], None], ...]] = {
    "0-contract": (
        contract.check_traits,
        contract.check_state_is_of_tensors,
        contract.check_empty_past,
        contract.check_forms,
        contract.check_changed_weights,
    ),
    "1-causality": (
        causality.check_causality,
        causality.check_causality_of_long_calls,
        causality.check_map_is_causal,
    ),
    "2-stream": (
        stream.check_cuts,
        stream.check_token_by_token,
        stream.check_saved_state,
        stream.check_moved_state,
        stream.check_far_positions,
        stream.check_state_functions,
    ),
    "3-memory": (
        memory.check_bytes,
        memory.check_capacity,
        memory.check_growing_columns,
        memory.check_given_state_is_kept,
        memory.check_interrupted_calls,
    ),
    "4-definition": (definition.check_definition,),
    "5-packing": (
        packing.check_padding,
        packing.check_documents,
        packing.check_carried_state,
        packing.check_ragged_calls,
        packing.check_long_rows,
        packing.check_blank_rows,
        packing.check_both_sides,
        packing.check_padding_gradients,
    ),
    "6-gradients": (
        gradients.check_reach,
        gradients.check_gradients_of_cuts,
        gradients.check_gradients_of_open_segment,
        gradients.check_numeric_gradients,
        gradients.check_detach,
        gradients.check_every_parameter,
    ),
    "7-cost": (cost.check_flops, cost.check_pairs),
    "8-quiet": (
        quiet.check_rows_are_independent,
        quiet.check_batch_size,
        quiet.check_bf16_streams,
        quiet.check_old_streams,
        quiet.check_large_inputs,
        quiet.check_autocast,
        quiet.check_draws_nothing,
        quiet.check_forward_changes_nothing,
        quiet.check_empty_inputs,
    ),
}


STREAM_ONLY = {
    contract.check_state_is_of_tensors,
    *CHECKS["2-stream"],
    *CHECKS["3-memory"],
    packing.check_carried_state,
    packing.check_ragged_calls,
    packing.check_blank_rows,
    gradients.check_gradients_of_cuts,
    gradients.check_gradients_of_open_segment,
    gradients.check_detach,
    quiet.check_old_streams,
}


GRADIENTS = {packing.check_padding_gradients, *CHECKS["6-gradients"]}


def runs(check: Callable[[Make], None], mixer: nn.Module) -> bool:
    """Whether the traits of a mixer ask for this check."""
    traits = mixer.traits
    if check is causality.check_map_is_causal and getattr(traits, "value_causal", False):
        return True  # later values reach nothing, whatever later keys do
    if check in CHECKS["1-causality"] and not traits.causal:
        return False
    if check in STREAM_ONLY and not traits.streams:
        return False
    if check in GRADIENTS and not trains(mixer):
        return False
    needs = {
        packing.check_both_sides: traits.bidirectional,
        memory.check_growing_columns: not traits.bounded,
    }
    return bool(needs.get(check, True))
