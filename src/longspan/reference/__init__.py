"""Dense, slow, obviously right definitions of every operation in `longspan.ops`, under the same names.

Start here to understand a mechanism: each definition is the paper's equation on the whole (query, key) matrix.
"""

from longspan.mechanisms.gated_delta.definition import gated_delta_attention, short_convolution
from longspan.reference.adaptive_span import adaptive_span_attention
from longspan.reference.associative import associative_attention, associative_read, associative_write, dpfp
from longspan.reference.block_sparse import block_sparse_attention
from longspan.reference.bp import bp_attention
from longspan.reference.compressive import attention_reconstruction, attention_usage, compressive_attention
from longspan.reference.entmax import entmax, entmax_attention
from longspan.reference.groups import group_attention
from longspan.reference.infini import infini_attention, infini_open
from longspan.reference.linear import favor_attention, favor_features, linear_attention
from longspan.reference.lsh import lsh_attention, lsh_buckets
from longspan.reference.memorizing import memorizing_attention
from longspan.reference.rotary import rotary_table, rotate
from longspan.reference.routing import routing_attention, routing_clusters
from longspan.reference.softmax import full_attention, relative_attention, relative_decode, window_attention
from longspan.reference.sparse import sparse_attention

__all__ = [
    "adaptive_span_attention",
    "associative_attention",
    "associative_read",
    "associative_write",
    "attention_reconstruction",
    "attention_usage",
    "block_sparse_attention",
    "bp_attention",
    "compressive_attention",
    "dpfp",
    "entmax",
    "entmax_attention",
    "favor_attention",
    "favor_features",
    "full_attention",
    "gated_delta_attention",
    "group_attention",
    "infini_attention",
    "infini_open",
    "linear_attention",
    "lsh_attention",
    "lsh_buckets",
    "memorizing_attention",
    "relative_attention",
    "relative_decode",
    "rotary_table",
    "rotate",
    "routing_attention",
    "routing_clusters",
    "short_convolution",
    "sparse_attention",
    "window_attention",
]
