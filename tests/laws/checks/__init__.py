"""One function per demand of a law: `check(make)` raises AssertionError, saying what, where a mixer breaks it.

`CHECKS` lists them by law. Which mixers a check is not for follows from their traits, and from what they show before
it is run (`why_not`).
"""

from collections.abc import Callable
from typing import Any

import torch

from ..tools import Make, inputs, trains
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
    "4-definition": (definition.check_definition, definition.check_definition_of_long_calls),
    "5-packing": (
        packing.check_padding,
        packing.check_documents,
        packing.check_carried_state,
        packing.check_ragged_calls,
        packing.check_long_rows,
        packing.check_blank_rows,
        packing.check_bidirectional,
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


# checks that draw examples
DRAWN = (
    causality.check_causality,
    stream.check_cuts,
    memory.check_bytes,
    packing.check_padding,
    packing.check_documents,
    packing.check_carried_state,
    packing.check_ragged_calls,
    packing.check_bidirectional,
    gradients.check_gradients_of_cuts,
)
GRADIENTS = {packing.check_padding_gradients, quiet.check_forward_changes_nothing, *CHECKS["6-gradients"]}


def why_not(check: Callable[[Make], None], mixer: Any) -> str:
    """Why a check is not for a mixer; "" where it is."""
    traits = mixer.traits
    is_map = check is causality.check_map_is_causal
    if check in CHECKS["1-causality"] and not traits.causal and not (is_map and traits.value_causal):
        return "later tokens change which earlier ones are seen"
    if check in STREAM_ONLY and not traits.streams:
        return "does not stream"
    if check in GRADIENTS and not trains(mixer):
        return "for inference alone"
    if check is packing.check_bidirectional and not traits.bidirectional:
        return "has no bidirectional form"
    if check is memory.check_growing_columns and traits.bounded:
        return "its state does not grow"
    if check is quiet.check_old_streams and not traits.bounded:
        return "its state grows"
    if (is_map or check is contract.check_empty_past) and not traits.linear_in_values:
        return "its output is not a map times the values"
    if check is contract.check_empty_past and not is_mean(mixer):
        return "its weights do not sum to one"
    return ""


@torch.no_grad()
def is_mean(mixer: Any) -> bool:
    """Whether outputs are means of values."""
    total = mixer.attention_map(inputs(1, 2, 1).expand(2, 24, -1)).sum(-1)
    return bool((total - 1).abs().max() <= 1e-9)
