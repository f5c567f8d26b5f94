"""Reformer's published weights (Kitaev et al. 2020), as transformers has them, as a `Decoder`.

    local layer      `window` with blocks: the own chunk and the one before, logits q . k / sqrt(head_dim)
    LSH layer        `lsh`, selection "sorted", shared: keys q / |q|, logits q . k, itself only where nothing else is
    reversible       two streams, both of them into the last norm and an output layer of 2 dim
    axial positions  factorized, with `position_dims`: a vector for each coordinate, side by side

The same function, up to rounding, of the same rotations: transformers draws them anew in every call, in evaluation too,
unless its configuration has a `hash_seed`; then they are drawn here as they are there and kept. Lengths up to a chunk
and multiples of all chunk lengths agree; in between transformers pads, and where both kinds of layers have chunks of
other lengths its last LSH chunks may be padding alone, which the first chunk then sees in the place of tokens.

The key projection of LSH layers, which the mechanism leaves aside, is a copy of that of queries. `lm_head.bias` is
added to the logits, as in Reformer's own code; transformers 5 before 5.24 stores it and leaves it out. Dropout of
attention weights is not taken over, with a warning.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.published import PublishedConfig, Renaming
from longspan.models import Decoder, DecoderConfig, load_weights

_WHERE = "import_checkpoint: reformer"
_CONSTANTS = ("mask_value_float16", "mask_value_float32")
"""Numbers that earlier versions of transformers stored beside the weights."""
_DIFFERENCES = (
    "looks back across rounds (the first chunk of a round sees the last one of the round before) and has no duplicate "
    "correction (a pair found in several rounds counts as often)"
)


def import_reformer(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Decoder:
    """A causal Reformer as a `Decoder`.

    Args:
        weights: of `ReformerModelWithLMHead`, under its names.
        config: of it, as plain data.

    Raises:
        ConfigError: the configuration lacks something.
        UnsupportedError: more than one round of hashes, a factorized hash, an unknown number of buckets, chunks that
            see other than themselves and the one before, an encoder, an activation that is neither relu nor gelu.
        CheckpointError: weights that are missing, left over, or of other shapes.
    """
    table = PublishedConfig(_WHERE, config)
    model = Decoder(_decoder(table))
    published = {name: weight for name, weight in weights.items() if not name.endswith(_CONSTANTS)}
    # two names of one tensor in transformers 4; where they differ (5.24 on), the logits take this one
    if "lm_head.decoder.bias" in published:
        published["lm_head.bias"] = published.pop("lm_head.decoder.bias")
    ours = _Mapping(published, model, table).run()
    load_weights(model, ours, _WHERE)
    return model


def _decoder(table: PublishedConfig) -> DecoderConfig:
    """The same architecture in this library's fields."""
    if not table["is_decoder"]:
        raise UnsupportedError(f"{_WHERE}: is_decoder = false is an encoder; only language models are imported")
    if table["hidden_act"] not in ("relu", "gelu"):
        raise UnsupportedError(f"{_WHERE}: hidden_act = {table['hidden_act']!r}: only relu and gelu are known here")
    if table.config.get("tie_word_embeddings"):
        raise UnsupportedError(f"{_WHERE}: tie_word_embeddings: the output layer is twice as wide as the embeddings")
    layers = list(table["attn_layers"])
    table.warn_of_dropout(*(f"{kind}_attention_probs_dropout_prob" for kind in sorted(set(layers))))
    positions: dict[str, Any] = {"positions": "learned", "max_positions": int(table["max_position_embeddings"])}
    if table["axial_pos_embds"]:
        positions = _axial(table)
    return DecoderConfig(
        vocab_size=int(table["vocab_size"]),
        dim=int(table["hidden_size"]),
        num_layers=len(layers),
        num_heads=int(table["num_attention_heads"]),
        head_dim=int(table["attention_head_size"]),
        mixers=tuple(_mixer(table, kind, index) for index, kind in enumerate(layers)),
        ffn_dim=int(table["feed_forward_size"]),
        activation=table["hidden_act"],
        norm="layernorm",
        norm_eps=float(table["layer_norm_eps"]),
        bias=True,
        mixer_bias=False,
        output_bias=True,
        dropout=float(table["hidden_dropout_prob"]),
        tie_embeddings=False,
        reversible=True,
        streams="both",
        **positions,
    )


def _axial(table: PublishedConfig) -> dict[str, Any]:
    """Positions by their coordinates."""
    dim, shape, widths = int(table["hidden_size"]), tuple(table["axial_pos_shape"]), tuple(table["axial_pos_embds_dim"])
    if sum(widths) != dim:
        raise ConfigError(f"{_WHERE}: axial_pos_embds_dim = {list(widths)} does not add up to hidden_size = {dim}")
    if len(widths) != len(shape):
        raise ConfigError(f"{_WHERE}: axial_pos_embds_dim = {list(widths)} is not one for each of axial_pos_shape")
    return {"positions": "factorized", "position_shape": shape, "position_dims": widths}


def _mixer(table: PublishedConfig, kind: str, index: int) -> dict[str, Any]:
    """The mixer of a layer."""
    if kind not in ("local", "lsh"):
        raise UnsupportedError(f"{_WHERE}: attn_layers[{index}] = {kind!r}: only local and lsh are known")
    seen = table[f"{kind}_num_chunks_before"], table[f"{kind}_num_chunks_after"]
    if seen != (1, 0):
        raise UnsupportedError(
            f"{_WHERE}: {kind}_num_chunks_before, _after = {seen[0]}, {seen[1]}: only 1, 0 is known, the own chunk and "
            "the one before"
        )
    if kind == "local":
        return {"name": "window", "window": int(table["local_attn_chunk_length"]), "blocks": True}
    return {
        "name": "lsh",
        "bucket_size": int(table["lsh_attn_chunk_length"]),
        "num_hashes": 1,
        "num_buckets": _buckets(table),
        "selection": "sorted",
        "redraw_every": 1 if table.config.get("hash_seed") is None else 0,  # drawn anew in every call
        "seed": index,
    }


def _buckets(table: PublishedConfig) -> int:
    """The number of buckets, of a hash that is the same here and there."""
    rounds, buckets = table["num_hashes"], table["num_buckets"]
    if rounds != 1:
        raise UnsupportedError(
            f"{_WHERE}: num_hashes = {rounds}: transformers {_DIFFERENCES}, so logits would differ; a config with "
            "num_hashes = 1 imports the same weights"
        )
    if isinstance(buckets, (list, tuple)) and len(buckets) == 1:
        buckets = buckets[0]
    if isinstance(buckets, (list, tuple)):
        raise UnsupportedError(
            f"{_WHERE}: num_buckets = {list(buckets)} is a factorized hash, of several that are not drawn here (and "
            f"with more rounds transformers {_DIFFERENCES}); a config with one even number imports the same weights"
        )
    if buckets is None:
        raise UnsupportedError(
            f"{_WHERE}: num_buckets is not set: transformers would take it from the first length that it sees, here "
            "it is a constant; set it in the config to the power of 2 at or below 2 * length / chunk"
        )
    return int(buckets)


class _Mapping(Renaming):
    """Weights under the names of a `Decoder`, each of the published ones used once."""

    def __init__(self, published: dict[str, Tensor], model: Decoder, table: PublishedConfig) -> None:
        super().__init__(_WHERE, published)
        self.table = table
        self.ours = dict(model.state_dict())

    def run(self) -> dict[str, Tensor]:
        """All of them. Raises CheckpointError: one is missing or left over."""
        self.move("embedding.weight", "reformer.embeddings.word_embeddings.weight")
        self._positions()
        for index, kind in enumerate(self.table["attn_layers"]):
            self._layer(f"blocks.{index}", f"reformer.encoder.layers.{index}", kind)
        self.move_pair("norm", "reformer.encoder.layer_norm")
        self.move("output.weight", "lm_head.decoder.weight")
        self.move("output_bias", "lm_head.bias")
        return self.done()

    def _positions(self) -> None:
        theirs = "reformer.embeddings.position_embeddings"
        if not self.table["axial_pos_embds"]:
            self.move("position_embedding.weight", f"{theirs}.embedding.weight")
            return
        for axis in range(len(self.table["axial_pos_shape"])):
            # (1, ..., size, ..., 1, width)
            part = self.take(f"{theirs}.weights.{axis}").flatten(0, -2)
            self.ours[f"position_embedding.tables.{axis}.weight"] = part

    def _layer(self, ours: str, theirs: str, kind: str) -> None:
        attention, maps = f"{theirs}.attention", f"{ours}.mixer.projections"
        names = ("query", "key", "value") if kind == "local" else ("query_key", "query_key", "value")
        taken = {name: self.take(f"{attention}.self_attention.{name}.weight") for name in dict.fromkeys(names)}
        for own, name in zip(("q_proj", "k_proj", "v_proj"), names, strict=True):
            if (own, name) != ("k_proj", "query_key"):  # shared keys are queries
                self.ours[f"{maps}.{own}.weight"] = taken[name]
        self.move(f"{maps}.o_proj.weight", f"{attention}.output.dense.weight")
        self.move_pair(f"{ours}.mixer_norm", f"{attention}.layer_norm")
        self.move_pair(f"{ours}.ffn_norm", f"{theirs}.feed_forward.layer_norm")
        self.move_pair(f"{ours}.ffn.up_proj", f"{theirs}.feed_forward.dense.dense")
        self.move_pair(f"{ours}.ffn.down_proj", f"{theirs}.feed_forward.output.dense")
        if kind == "lsh":
            self._rotations(f"{ours}.mixer.core.rotations", taken["value"].dtype)

    def _rotations(self, name: str, dtype: torch.dtype) -> None:
        own, seed = self.ours[name].to(dtype), self.table.config.get("hash_seed")
        if seed is not None:
            heads, rounds, head_dim, half = own.shape
            generator = torch.Generator().manual_seed(seed)
            own = torch.randn(heads, head_dim, rounds, half, generator=generator, dtype=dtype).transpose(1, 2)
        self.ours[name] = own
