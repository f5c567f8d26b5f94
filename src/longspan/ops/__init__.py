"""Fast attention operations: pure functions on (batch, heads, length, head_dim), no parameters, no configuration.

Each is the twin of the definition of the same name in `longspan.reference`. The `*_cost` functions give the score
entries that a forward call really computes.
"""

from longspan.mechanisms.gated_delta.operation import gated_delta_attention, gated_delta_cost, short_convolution
from longspan.ops.adaptive_span import adaptive_span_attention, adaptive_span_cost, span_reach
from longspan.ops.associative import (
    AssociativeMaps,
    associative_attention,
    associative_cost,
    associative_open,
    associative_read,
    associative_write,
    dpfp,
)
from longspan.ops.block_sparse import block_sparse_attention
from longspan.ops.bp import bp_attention, bp_cost, bp_entries, bp_pairs, bp_slots, empty_nodes
from longspan.ops.bp_nodes import TreeNodes
from longspan.ops.compressive import attention_reconstruction, attention_usage, compressive_attention, compressive_cost
from longspan.ops.entmax import entmax, entmax_attention, entmax_cost
from longspan.ops.favor import (
    KERNELS,
    bounded_constant,
    favor_attention,
    favor_features,
    num_features_of,
    orthogonal_projection,
)
from longspan.ops.favor import (
    SOFTMAX as SOFTMAX_KINDS,
)
from longspan.ops.full import full_attention, full_cost
from longspan.ops.groups import group_attention, group_attention_cost
from longspan.ops.infini import infini_attention, infini_cost, infini_open
from longspan.ops.linear import (
    EMPTY,
    LinearSums,
    elu_features,
    empty_sums,
    group_cost,
    linear_attention,
    linear_cost,
)
from longspan.ops.lsh import lsh_attention, lsh_buckets, lsh_cost
from longspan.ops.memorizing import memorizing_attention, memorizing_cost, unit_vectors
from longspan.ops.relative import relative_attention, relative_cost, relative_decode
from longspan.ops.ring_buffer import LSHRings, push_rings, push_token
from longspan.ops.rotary import rotary_table, rotate
from longspan.ops.routing import routing_attention, routing_clusters, routing_cost
from longspan.ops.segments import SegmentMemory, empty_memory
from longspan.ops.sparse import sparse_attention, sparse_cost
from longspan.ops.sums import sums_dtype
from longspan.ops.window import window_attention, window_cost

__all__ = [
    "EMPTY",
    "KERNELS",
    "SOFTMAX_KINDS",
    "AssociativeMaps",
    "LSHRings",
    "LinearSums",
    "SegmentMemory",
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
]
