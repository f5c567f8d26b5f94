"""FLOPs of a Transformer by the convention of scaling papers, and the saving by recurrence over segments.

The convention is that of Hoffmann et al. 2022 (appendix F): 2 FLOPs per multiply-add, 3 per score for softmax, one
vocabulary product. It is not the exact count of a longspan model, which is `model.flops(length)`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Sizes of a Transformer: layers, width, width of the feed-forward layers, heads, vocabulary."""

    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    vocab_size: int = 50272


OPT = {
    "125M": TransformerSize(num_layers=12, dim=768, ffn_dim=3072, num_heads=12),
    "1.3B": TransformerSize(num_layers=24, dim=2048, ffn_dim=8192, num_heads=32),
    "6.7B": TransformerSize(num_layers=32, dim=4096, ffn_dim=16384, num_heads=32),
    "30B": TransformerSize(num_layers=48, dim=7168, ffn_dim=28672, num_heads=56),
    "175B": TransformerSize(num_layers=96, dim=12288, ffn_dim=49152, num_heads=96),
}
"""The OPT models (Zhang et al. 2022, table 1)."""


def forward_flops(size: TransformerSize, length: int, *, vocabulary: bool = True) -> int:
    """Return the FLOPs of a forward pass over `length` tokens at once.

    Per layer: 6 n D^2 for q, k and v; 4 n^2 D for scores and weighted values; 3 H n^2 for the softmax; 2 n D^2 for the
    output; 4 n D D_ff for the feed-forward. Then 2 n D V once.

    Args:
        size: of the model.
        length: n.
        vocabulary: count the output layer.
    """
    n, d = length, size.dim
    layer = 8 * n * d * d + 4 * n * n * d + 3 * size.num_heads * n * n + 4 * n * d * size.ffn_dim
    return size.num_layers * layer + (2 * n * d * size.vocab_size if vocabulary else 0)


def recurrent_ratio(size: TransformerSize, *, segments: int = 4096, segment_length: int = 512) -> float:
    """Return how many times fewer FLOPs a recurrent memory needs than the same model over the whole text at once.

    The convention is that of Bulatov et al. 2023 (figure 2), confirmed by its printed 295 (OPT-125M) and 29 (OPT-175B)
    at 4,096 segments of 512: memory tokens are part of the 512, and the vocabulary product is counted in each segment.
    """
    whole = forward_flops(size, segments * segment_length)
    return whole / (segments * forward_flops(size, segment_length))
