"""Fast attention operations: pure functions on (batch, heads, length, head_dim), no parameters, no configuration.

Each is the twin of the definition of the same name in `longspan.reference`. The `*_cost` functions give the score
entries that a forward call really computes.
"""

from typing import TYPE_CHECKING

from longspan.engine.block_sparse import block_sparse_attention
from longspan.engine.groups import group_attention, group_attention_cost
from longspan.engine.linear_chunks import EMPTY, LinearSums
from longspan.engine.ring_buffer import LSHRings, push_rings, push_token
from longspan.engine.rotary import rotary_table, rotate
from longspan.engine.segments import SegmentMemory, empty_memory
from longspan.engine.sinks import Sinks
from longspan.engine.sums import sums_dtype
from longspan.mechanisms.adaptive_span.operation import adaptive_span_attention, adaptive_span_cost, span_reach
from longspan.mechanisms.associative.operation import (
    AssociativeMaps,
    associative_attention,
    associative_cost,
    associative_open,
    associative_read,
    associative_write,
    dpfp,
)
from longspan.mechanisms.bp.nodes import TreeNodes
from longspan.mechanisms.bp.operation import bp_attention, bp_cost, bp_entries, bp_pairs, bp_slots, empty_nodes
from longspan.mechanisms.compressive.operation import (
    attention_reconstruction,
    attention_usage,
    compressive_attention,
    compressive_cost,
)
from longspan.mechanisms.entmax.operation import entmax, entmax_attention, entmax_cost
from longspan.mechanisms.full.operation import full_attention, full_cost
from longspan.mechanisms.gated_delta.operation import gated_delta_attention, gated_delta_cost, short_convolution
from longspan.mechanisms.infini.operation import infini_attention, infini_cost, infini_open
from longspan.mechanisms.linear.operation import elu_features, empty_sums, group_cost, linear_attention, linear_cost
from longspan.mechanisms.lsh.operation import lsh_attention, lsh_buckets, lsh_cost
from longspan.mechanisms.memorizing.operation import memorizing_attention, memorizing_cost, unit_vectors
from longspan.mechanisms.performer.operation import (
    KERNELS,
    bounded_constant,
    favor_attention,
    favor_features,
    num_features_of,
    orthogonal_projection,
)
from longspan.mechanisms.performer.operation import (
    SOFTMAX as SOFTMAX_KINDS,
)
from longspan.mechanisms.routing.operation import routing_attention, routing_clusters, routing_cost
from longspan.mechanisms.sparse.operation import sparse_attention, sparse_cost
from longspan.mechanisms.transformer_xl.operation import relative_attention, relative_cost, relative_decode
from longspan.mechanisms.window.operation import window_attention, window_cost
from longspan.mechanisms.window_linear.operation import window_linear_attention, window_linear_cost
from longspan.renames import accept_old_names

__all__ = [
    "EMPTY",
    "KERNELS",
    "SOFTMAX_KINDS",
    "AssociativeMaps",
    "LSHRings",
    "LinearSums",
    "SegmentMemory",
    "Sinks",
    "TreeNodes",
    "adaptive_span_attention",
    "adaptive_span_cost",
    "associative_attention",
    "associative_cost",
    "associative_open",
    "associative_read",
    "associative_write",
    "attention_reconstruction",
    "attention_usage",
    "block_sparse_attention",
    "bounded_constant",
    "bp_attention",
    "bp_cost",
    "bp_entries",
    "bp_pairs",
    "bp_slots",
    "compressive_attention",
    "compressive_cost",
    "dpfp",
    "elu_features",
    "empty_memory",
    "empty_nodes",
    "empty_sums",
    "entmax",
    "entmax_attention",
    "entmax_cost",
    "favor_attention",
    "favor_features",
    "full_attention",
    "full_cost",
    "gated_delta_attention",
    "gated_delta_cost",
    "group_attention",
    "group_attention_cost",
    "group_cost",
    "infini_attention",
    "infini_cost",
    "infini_open",
    "linear_attention",
    "linear_cost",
    "lsh_attention",
    "lsh_buckets",
    "lsh_cost",
    "memorizing_attention",
    "memorizing_cost",
    "num_features_of",
    "orthogonal_projection",
    "push_rings",
    "push_token",
    "relative_attention",
    "relative_cost",
    "relative_decode",
    "rotary_table",
    "rotate",
    "routing_attention",
    "routing_clusters",
    "routing_cost",
    "short_convolution",
    "span_reach",
    "sparse_attention",
    "sparse_cost",
    "sums_dtype",
    "unit_vectors",
    "window_attention",
    "window_cost",
    "window_linear_attention",
    "window_linear_cost",
]

if not TYPE_CHECKING:  # a checker of types shall see today's signatures alone
    accept_old_names(globals())
