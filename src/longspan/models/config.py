"""Configurations of the library's own models."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from longspan import renames
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Configuration fields that Decoder and Encoder share.

    Attributes:
        vocab_size: number of token ids.
        dim: width of the hidden states.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; None = num_heads.
        head_dim: width per head; None = dim // num_heads.
        mixers: tables with the `name` of a mixer and its fields; the list repeats over the layers, so two entries
            alternate. With `rope = false` in its table a mixer has no RoPE: it compares contents alone, equally at all
            distances (NoPE, Kazemnejad et al. 2023), and the order of tokens reaches it from the other layers.
        ffn_dim: width of the feed-forward; None = 4 dim (gelu, relu) or 8/3 dim rounded up to 32 (swiglu).
        activation: of the feed-forward.
        norm: "rmsnorm" (Zhang & Sennrich 2019) or "layernorm".
        norm_position: "pre" normalizes the input of a sublayer, "post" the sum after it (the 2017 Transformer and
            Transformer-XL).
        norm_eps: added to the variance.
        final_norm: add a norm after the last block; None = only if norm_position is "pre". Pre-norm models of the
            Transformer-XL code have none.
        positions: "rope" (applied inside the mixers that use it), "learned" (a table of `max_positions`), "factorized"
            (one learned vector per coordinate in `position_shape`: their sum, or with `position_dims` all of them
            concatenated) or "none".
        rope_theta: base of RoPE.
        max_positions: size of the learned table.
        position_shape: sizes of the coordinates of a position, the last coordinate fastest (Child et al. 2019, section
            5.3): (32, 32, 3) for rows, columns and channels of an image, (n / stride, stride) for text. A recipe may
            leave it out if the task sets it (`tiles`, `music`).
        position_dims: widths of the vectors of the coordinates, which are then concatenated to `dim` (axial positions,
            as in Reformer); () = vectors of width `dim`, which are summed.
        bias: biases in all linear maps and layer norms.
        mixer_bias: biases in the mixers' linear maps; None = as `bias`. (The Transformer-XL code has biases only in its
            feed-forward.)
        dropout: on embeddings and on the output of every sublayer.
        tie_embeddings: the output layer uses the embedding's weights.
        scale_embeddings: multiply embeddings by sqrt(dim), as the 2017 Transformer and Transformer-XL do.
        checkpoint: recompute blocks in the backward pass instead of storing their activations.
        reversible: two residual streams, from whose last values the backward pass reconstructs all earlier ones, so
            that activations take the memory of one layer at any depth; see `longspan.models.reversible`. It computes
            another function than without it, with the same parameters; pre-norm only.
        streams: input of the last norm and the output layer in reversible models: the "mean" of the two streams, or
            "both" concatenated, hidden states of width 2 dim (as in Reformer's published weights; a Decoder then needs
            `tie_embeddings = False`).
        ffn_chunk: tokens that the feed-forward processes at a time (Kitaev et al. 2020, section 3), recomputed in the
            backward pass, so that its inner activations exist for that many only; 0 = all. Results do not change.
        init_std: standard deviation of the initial weights.
        init: "normal" by `init_std`, or "sparse" (Child et al. 2019, section 6): standard deviation 0.125 / sqrt(d_in)
            for linear maps, smaller by sqrt(2 num_layers) where they write into the residual stream; 0.125 / sqrt(dim)
            for token embeddings, smaller by sqrt(number of coordinates) for positions; 0 for the output layer, so that
            the first loss is exactly log(vocab_size). A Decoder then needs `tie_embeddings = False`.
    """

    vocab_size: int = 256
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mixers: tuple[dict[str, Any], ...] = ({"name": "full"},)
    ffn_dim: int | None = None
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    final_norm: bool | None = None
    positions: Literal["rope", "learned", "factorized", "none"] = "rope"
    rope_theta: float = 10000.0
    max_positions: int = 0
    position_shape: tuple[int, ...] = ()
    position_dims: tuple[int, ...] = ()
    bias: bool = False
    mixer_bias: bool | None = None
    dropout: float = 0.0
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    checkpoint: bool = False
    reversible: bool = False
    streams: Literal["mean", "both"] = "mean"
    ffn_chunk: int = 0
    init_std: float = 0.02
    init: Literal["normal", "sparse"] = "normal"

    def __post_init__(self) -> None:
        where = type(self).__name__
        for name in ("vocab_size", "dim", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{where}.{name} = {getattr(self, name)}: must be at least 1")
        if not self.mixers:
            raise ConfigError(f"{where}.mixers is empty; add at least one table, for example name = 'full'")
        for i, mixer in enumerate(self.mixers):
            if not isinstance(mixer, dict) or not isinstance(mixer.get("name"), str):
                raise ConfigError(f"{where}.mixers[{i}] = {mixer!r}: expected a table with a name")
        object.__setattr__(self, "positions", renames.value("model.positions", self.positions))
        self._check_positions(where)
        for i, mixer in enumerate(self.mixers):
            self._check_rope(f"{where}.mixers[{i}]", mixer)
        if self.ffn_chunk < 0:
            raise ConfigError(f"{where}.ffn_chunk = {self.ffn_chunk}: must be at least 1 token, or 0 for all tokens")
        if self.reversible and self.norm_position != "pre":
            raise ConfigError(f"{where}.reversible: reversible blocks are pre-norm; set norm_position = 'pre'")
        if self.reversible and self.checkpoint:
            raise ConfigError(f"{where}.reversible: already recomputes every block; set checkpoint = false")
        if self.streams == "both" and not self.reversible:
            raise ConfigError(f"{where}.streams = 'both': needs reversible blocks; set reversible = true")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{where}.dropout = {self.dropout}: must be in [0, 1)")

    def _check_rope(self, where: str, mixer: dict[str, Any]) -> None:
        """Raise a ConfigError if the field `rope` of a mixer is not a switch, or has nothing to switch off."""
        rope = mixer.get("rope", True)
        if not isinstance(rope, bool):
            raise ConfigError(f"{where}.rope = {rope!r}: must be true or false; the base of RoPE is model.rope_theta")
        if "rope" in mixer and self.positions != "rope":
            raise ConfigError(
                f"{where}.rope: a switch for models with positions = 'rope', not {self.positions!r}; leave it out"
            )

    def _check_positions(self, where: str) -> None:
        """Raise a ConfigError if the fields of positions contradict each other."""
        shape, widths = self.position_shape, self.position_dims
        if self.positions == "learned" and self.max_positions < 1:
            raise ConfigError(f"{where}.max_positions = {self.max_positions}: must be at least 1 for learned positions")
        if self.positions == "factorized" and (not shape or min(shape) < 1):
            raise ConfigError(
                f"{where}.position_shape = {shape}: factorized positions need sizes of at least 1, for "
                "example [32, 32, 3]"
            )
        if widths and self.positions != "factorized":
            raise ConfigError(
                f"{where}.position_dims: needs positions = 'factorized', not {self.positions!r}; set it, or leave "
                "position_dims out"
            )
        if widths and (len(widths) != len(shape) or min(widths) < 1 or sum(widths) != self.dim):
            raise ConfigError(
                f"{where}.position_dims = {list(widths)}: needs a width of at least 1 for each of the {len(shape)} "
                f"sizes in position_shape = {list(shape)}, with the sum dim = {self.dim}"
            )

    @property
    def num_positions(self) -> int:
        """Number of positions in the learned or factorized tables."""
        return math.prod(self.position_shape) if self.positions == "factorized" else self.max_positions

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden states after the last norm."""
        return 2 * self.dim if self.streams == "both" else self.dim

    @property
    def inner_dim(self) -> int:
        """Inner width of the feed-forward network."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return -(-8 * self.dim // 96) * 32 if self.activation == "swiglu" else 4 * self.dim


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
    """Configuration of a causal language model; see `StackConfig` for the other fields.

    Attributes:
        output_bias: the output layer has a bias for every token.
        adaptive_cutoffs: splits the vocabulary, whose ids are frequency ranks, into clusters for adaptive embeddings
            (Baevski & Auli 2019) and an adaptive softmax (Grave et al. 2017): the first token id of each cluster but
            the first, increasing, for example (20_000, 40_000, 200_000). Empty: one softmax. See
            `longspan.models.adaptive`.
        adaptive_div: each cluster's tables are narrower than those of the previous one by this factor. 1: all have the
            same width, and the embeddings are one table.
        embedding_dim: width of the (first cluster's) embeddings; None = dim. If set, a linear map connects it to dim;
            without cutoffs these are the factorized embeddings of Lan et al. 2020 (section 3.1). With clusters of
            several widths each has a map in any case.
        tie_projections: with `tie_embeddings` the output layer also uses these maps: of "all" clusters, of the "rare"
            ones (all but the first), or of "none".
    """

    output_bias: bool = False
    adaptive_cutoffs: tuple[int, ...] = ()
    adaptive_div: float = 4.0
    embedding_dim: int | None = None
    tie_projections: Literal["all", "rare", "none"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        cuts = (0, *self.adaptive_cutoffs)
        if any(first >= last for first, last in itertools.pairwise(cuts)):
            raise ConfigError(
                f"DecoderConfig.adaptive_cutoffs = {list(self.adaptive_cutoffs)}: must increase from at least 1, for "
                "example [20000, 40000, 200000]"
            )
        if self.adaptive_div < 1:
            raise ConfigError(f"DecoderConfig.adaptive_div = {self.adaptive_div}: must be at least 1")
        if self.cluster_widths[-1] < 1:
            raise ConfigError(
                f"DecoderConfig.adaptive_div = {self.adaptive_div}: gives embeddings of widths {self.cluster_widths}; "
                "use a smaller one, or fewer adaptive_cutoffs"
            )
        if self.streams == "both" and (self.tie_embeddings or self.adaptive):
            raise ConfigError(
                "DecoderConfig.streams = 'both': makes the output layer twice as wide as the embeddings; set "
                "tie_embeddings = false, and no adaptive_cutoffs or embedding_dim"
            )
        if self.init == "sparse" and self.tie_embeddings:
            raise ConfigError(
                "DecoderConfig.init = 'sparse': starts the output layer at zero, so it cannot be tied to embeddings; "
                "set tie_embeddings = false"
            )

    @property
    def adaptive(self) -> bool:
        """Whether embeddings have clusters or maps, and the output layer is an `AdaptiveSoftmax`."""
        return bool(self.adaptive_cutoffs) or self.embedding_dim is not None

    @property
    def cluster_widths(self) -> list[int]:
        """Width of the embedding table of each cluster."""
        width = self.dim if self.embedding_dim is None else self.embedding_dim
        return [int(width // self.adaptive_div**index) for index in range(len(self.adaptive_cutoffs) + 1)]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig):
    """Configuration of a bidirectional encoder; see `StackConfig` for the fields."""


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """Configuration of a recurrent memory over a backbone.

    Attributes:
        num_memory_tokens: memory tokens (with `accumulate`, per summary of one segment).
        segment_length: real tokens per segment.
        bptt_segments: gradients reach that many segments back, counting the segment of the loss as the first; None =
            all.
        update: "gated" or "paper", see `longspan.models.memory_update`.
        alignment: "left" for streams: segments start at multiples of `segment_length`. "right", if the whole text is
            passed at once: the remainder goes into the first segment, so that the last is always full.
        accumulate: keep the summaries of several segments instead of one memory (AutoCompressor).
        max_summaries: number of segments whose summaries are kept; older ones are dropped.
        vary: in training, each call draws its segment length between (1 - vary) segment_length and segment_length; such
            a call takes and returns no state.
        replay: store only the memories in the forward pass and recompute segment by segment in the backward pass
            (memory replay, Memformer, Wu et al. 2020, algorithm 1): the same gradients with the activations of one
            segment.
        gate_noise: scale of the logistic noise on the gate in training, see `GatedUpdate`.
        gate_penalty: weight of the auxiliary loss on open gates (mean of max(logit, 0)), appended to `aux_losses`.
        per_layer: an associative memory in every layer instead of one memory for all (ARMT), see
            `longspan.models.layer_memory`; `update`, `accumulate` and the gate then have no effect.
        memory_dim: width of keys and queries of `per_layer`.
        dpfp: nu of its feature map.
        diagonal: run `per_layer` over several segments at once, layer by layer along diagonals: the same result in
            another order. Mechanisms whose kernels do not run for several layers at once still run segment by segment.
    """

    num_memory_tokens: int = 10
    segment_length: int = 499
    bptt_segments: int | None = None
    update: Literal["gated", "paper"] = "gated"
    alignment: Literal["left", "right"] = "left"
    accumulate: bool = False
    max_summaries: int = 8
    vary: float = 0.0
    replay: bool = False
    gate_noise: float = 0.0
    gate_penalty: float = 0.0
    per_layer: bool = False
    memory_dim: int = 64
    dpfp: int = 3
    diagonal: bool = False

    def __post_init__(self) -> None:
        for name in ("num_memory_tokens", "segment_length", "max_summaries", "bptt_segments", "memory_dim", "dpfp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"RecurrentMemory.{name} = {value}: must be at least 1")
        if not 0 <= self.vary < 1:
            raise ConfigError(f"RecurrentMemory.vary = {self.vary}: must be in [0, 1)")
        if self.per_layer and self.accumulate:
            raise ConfigError(
                "RecurrentMemory.accumulate: cannot be combined with per_layer, which has no summaries; leave one out"
            )
        if self.diagonal and not self.per_layer:
            raise ConfigError("RecurrentMemory.diagonal: needs per_layer; set per_layer = true")
