"""Dense, slow, obviously right definitions of every operation in `longspan.ops`, under the same names.

Start here to understand a mechanism: each definition is the paper's equation on the whole (query, key) matrix.
"""

from typing import TYPE_CHECKING

from longspan.engine.definitions.block_sparse import block_sparse_attention
from longspan.engine.definitions.groups import group_attention
from longspan.engine.definitions.rotary import rotary_table, rotate
from longspan.mechanisms.adaptive_span.definition import adaptive_span_attention
from longspan.mechanisms.associative.definition import associative_attention, associative_read, associative_write, dpfp
from longspan.mechanisms.bp.definition import bp_attention
from longspan.mechanisms.compressive.definition import attention_reconstruction, attention_usage, compressive_attention
from longspan.mechanisms.entmax.definition import entmax, entmax_attention
from longspan.mechanisms.full.definition import full_attention
from longspan.mechanisms.gated_delta.definition import gated_delta_attention, short_convolution
from longspan.mechanisms.infini.definition import infini_attention, infini_open
from longspan.mechanisms.linear.definition import linear_attention
from longspan.mechanisms.lsh.definition import lsh_attention, lsh_buckets
from longspan.mechanisms.memorizing.definition import memorizing_attention
from longspan.mechanisms.performer.definition import favor_attention, favor_features
from longspan.mechanisms.routing.definition import routing_attention, routing_clusters
from longspan.mechanisms.sparse.definition import sparse_attention
from longspan.mechanisms.transformer_xl.definition import relative_attention, relative_decode
from longspan.mechanisms.window.definition import window_attention
from longspan.mechanisms.window_linear.definition import window_linear_attention
from longspan.renames import accept_old_names

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
    "window_linear_attention",
]

if not TYPE_CHECKING:  # a checker of types shall see today's signatures alone
    accept_old_names(globals())
