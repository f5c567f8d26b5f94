"""Import Transformer-XL's published weights (Dai et al. 2019), in the format of transformers up to 4.35, as a
`Decoder`.

    attention          `transformer_xl`; `untie_r`: u and w per layer; if one pair serves all layers, each gets a copy
    blocks             post-norm, or pre-norm without a last norm (`pre_lnorm`); biases in the feed-forward only
    embeddings         adaptive (`cutoffs`, `div_val`, `d_embed`), times sqrt(dim)
    output layer       adaptive softmax with a bias for every token and cluster, tied as in `tie_projs`

The model computes the same function, up to rounding, from the same memory, with two differences. First, a text starts
without memory here, as in the paper's PyTorch code; transformers (and the paper's TensorFlow code) start with `mem_len`
zero vectors, which tokens see until they are pushed out: `zero_memory` returns such a state. Second, without
`same_length` a token sees its segment and the `mem_len` positions before it, and in transformers a segment is a call:
`tgt_len` in the configuration sets its length here (default `mem_len`, as the paper trains), and calls of another
length there behave differently. With `same_length` (all published language models) only the end of gradients depends on
the segment.

Token ids are those of the published vocabulary, which `tokenizer = "word"` does not have: encode text with the
tokenizer that came with the weights. Memory, `same_length` and `clamp_len` may differ from training: change them in the
configuration. Dropout of attention weights, positions and the last hidden states, which transformers has in training,
is ignored.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.hf.published import PublishedConfig, Renaming
from longspan.mechanisms.transformer_xl.layer import TransformerXLMechanism, TransformerXLState
from longspan.models import Decoder, DecoderConfig, StackState, load_weights

_WHERE = "import_checkpoint: transfo-xl"
_TIED = ("crit.out_layers.", "crit.out_projs.")
_BIASES = {"content_bias": "r_w_bias", "position_bias": "r_r_bias"}


def import_transfo_xl(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Decoder:
    """Build a `Decoder` from the weights of a Transformer-XL language model.

    Args:
        weights: of `TransfoXLLMHeadModel`, by its names; tied ones may be left out.
        config: its configuration, as plain data; optionally `tgt_len`, the tokens per segment.

    Raises:
        ConfigError: the configuration has a missing field.
        UnsupportedError: an attention other than the paper's (`attn_type`), a sampled softmax, or `ext_len`.
        CheckpointError: weights that are missing, unexpected, or have other shapes.
    """
    table = _Table(config)
    model = Decoder(_decoder_config(table))
    published = {name: weight for name, weight in weights.items() if not name.endswith("pos_emb.inv_freq")}
    load_weights(model, _WeightMap(published, model, table).run(), _WHERE)
    return model


def zero_memory(model: Decoder, batch_size: int = 1) -> StackState:
    """Return the state in which transformers starts a text: `mem_len` zero vectors in every layer, visible as if read.

    Args:
        model: a decoder of `transformer_xl` layers with cache = "hidden".
        batch_size: rows.

    Raises:
        UnsupportedError: a layer has another mechanism, or segment lengths differ.
    """
    cores = model.cores()
    layers: list[TransformerXLState] = []
    for block, core in zip(model.layers, cores, strict=True):
        if not isinstance(core, TransformerXLMechanism) or core.config.cache != "hidden":
            raise UnsupportedError("zero_memory: every layer must be transformer_xl with cache = 'hidden'")
        empty = block.mixer.init_state(batch_size)
        # the memory of a pre-norm block contains the zeros after its norm
        hidden = empty.hidden if block.post else block.mixer_norm(empty.hidden).detach()
        # a multiple of the segment, so that the first token starts a segment
        count = core.config.segment * -(-core.reach // core.config.segment)
        layers.append(TransformerXLState(hidden, torch.full_like(empty.live, count)))
    if len({int(state.live[0]) for state in layers}) != 1:
        raise UnsupportedError("zero_memory: the layers have segments of different lengths; they must be equal")
    return StackState(tuple(layers), layers[0].live)


class _Table(PublishedConfig):
    """A published configuration that raises for missing fields and unsupported values."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(_WHERE, config := {**config})
        # name of the field in earlier versions
        if "n_token" in config:
            config.setdefault("vocab_size", config["n_token"])
        for name, known in (("attn_type", 0), ("ext_len", 0)):
            if config.get(name, known) != known:
                raise UnsupportedError(f"{_WHERE}: {name} = {config[name]!r}: only {known} is supported")
        if config.get("sample_softmax", -1) > 0:
            raise UnsupportedError(f"{_WHERE}: sample_softmax = {config['sample_softmax']}: only -1 is supported")
        self.cuts = tuple(int(cut) for cut in self["cutoffs"])
        self.tied = bool(config.get("tie_word_embeddings", True))
        # one embedding table and at most one projection for all clusters
        self.has_one_table = self["div_val"] == 1
        self.has_projections = not self.has_one_table or self["d_embed"] != self["d_model"]
        shared = [False] + [bool(config.get("proj_share_all_but_first", True))] * len(self.cuts)
        self.tied_maps = [bool(tied) for tied in config.get("tie_projs", shared)][: len(self.cuts) + 1]
        if len(self.tied_maps) <= len(self.cuts):
            raise ConfigError(
                f"{_WHERE}: tie_projs has {len(self.tied_maps)} values; it needs one for each of the "
                f"{len(self.cuts) + 1} clusters"
            )

    @property
    def plain(self) -> bool:
        """Whether there is one table and one softmax, without clusters and projections."""
        return not self.cuts and not self.has_projections


def _decoder_config(table: _Table) -> DecoderConfig:
    """Return the configuration of a `Decoder` with the architecture of a Transformer-XL of transformers."""
    table.warn_of_dropout("dropatt")
    mem_len = int(table["mem_len"])
    segment = int(table.config.get("tgt_len") or mem_len)
    if not segment:
        raise ConfigError(f"{_WHERE}: mem_len = 0: set tgt_len to the number of tokens per segment")
    mixer = {
        "name": "transformer_xl",
        "segment": segment,
        "mem_len": mem_len,
        "same_length": bool(table["same_length"]),
        "clamp_len": max(int(table["clamp_len"]), 0),
    }
    dim, width = int(table["d_model"]), int(table["d_embed"])
    maps: Literal["all", "rare", "none"] = "all" if all(table.tied_maps) else "none"
    if maps == "none" and table.cuts and all(table.tied_maps[1:]):
        maps = "rare"
    return DecoderConfig(
        vocab_size=int(table["vocab_size"]),
        dim=dim,
        num_layers=int(table["n_layer"]),
        num_heads=int(table["n_head"]),
        head_dim=int(table["d_head"]),
        mixers=(mixer,),
        ffn_dim=int(table["d_inner"]),
        activation="relu",
        norm="layernorm",
        norm_position="pre" if table["pre_lnorm"] else "post",
        norm_eps=float(table["layer_norm_epsilon"]),
        final_norm=False,
        positions="none",
        bias=True,
        mixer_bias=False,
        dropout=float(table["dropout"]),
        tie_embeddings=table.tied,
        scale_embeddings=True,
        output_bias=True,
        adaptive_cutoffs=table.cuts,
        adaptive_div=float(table["div_val"]),
        embedding_dim=width if width != dim or (table.has_projections and not table.cuts) else None,
        tie_projections=maps,
    )


class _WeightMap(Renaming):
    """Maps the published weights to the names of a `Decoder`, each of them used exactly once."""

    def __init__(self, published: dict[str, Tensor], model: Decoder, table: _Table) -> None:
        super().__init__(_WHERE, published)
        self.table, self.count = table, model.config.num_layers
        self.names = model.state_dict().keys()

    def run(self) -> dict[str, Tensor]:
        """Return all weights by the names of the `Decoder`.

        Raises:
            CheckpointError: one is missing or not used.
        """
        for index in range(self.count):
            self._layer(f"blocks.{index}", f"transformer.layers.{index}")
        for name in _BIASES.values():
            self.left.pop(f"transformer.{name}", None)
        self._embedding()
        self._output()
        for name in [name for name in self.left if name.startswith(_TIED) and self._unused(name)]:
            del self.left[name]
        return self.done()

    def _layer(self, ours: str, theirs: str) -> None:
        """Map the weights of one layer."""
        attention, mixer = f"{theirs}.dec_attn", f"{ours}.mixer"
        fused = self.take(f"{attention}.qkv_net.weight")
        for name, part in zip(("q_proj", "k_proj", "v_proj"), fused.chunk(3), strict=True):
            self.ours[f"{mixer}.projections.{name}.weight"] = part
        self.move(f"{mixer}.projections.o_proj.weight", f"{attention}.o_net.weight")
        self.move(f"{mixer}.core.r_proj.weight", f"{attention}.r_net.weight")
        for own, name in _BIASES.items():
            # a pair that all layers share may be saved once
            shared = f"transformer.{name}"
            own_name = f"{attention}.{name}"
            bias = self.left[shared] if own_name not in self.left and shared in self.left else self.take(own_name)
            self.ours[f"{mixer}.core.{own}"] = bias
        self.move_pair(f"{ours}.mixer_norm", f"{attention}.layer_norm")
        self.move_pair(f"{ours}.ffn_norm", f"{theirs}.pos_ff.layer_norm")
        self.move_pair(f"{ours}.ffn.up_proj", f"{theirs}.pos_ff.CoreNet.0")
        self.move_pair(f"{ours}.ffn.down_proj", f"{theirs}.pos_ff.CoreNet.3")

    def _embedding(self) -> None:
        """Map the tables of the embedding, and their projections."""
        table, theirs = self.table, "transformer.word_emb"
        if table.plain:
            self.move("embedding.weight", f"{theirs}.emb_layers.0.weight")
            return
        count = 1 if table.has_one_table else len(table.cuts) + 1
        for index in range(count):
            self.move(f"embedding.tables.{index}.weight", f"{theirs}.emb_layers.{index}.weight")
            if table.has_projections:
                self.move(f"embedding.projections.{index}.weight", f"{theirs}.emb_projs.{index}")

    def _output(self) -> None:
        """Map the weights and biases of the output layer."""
        table = self.table
        clusters = len(table.cuts) + 1
        ends = (0, *table.cuts, int(table["vocab_size"]))
        sizes = [ends[index + 1] - ends[index] for index in range(clusters)]

        def layers(part: str) -> list[Tensor]:
            """Return the weight or bias of `crit.out_layers`, split by cluster."""
            if not table.has_one_table:
                return [self.take(f"crit.out_layers.{index}.{part}") for index in range(clusters)]
            whole = self.take(f"crit.out_layers.0.{part}")
            if len(whole) != sum(sizes):
                raise CheckpointError(
                    f"{_WHERE}: crit.out_layers.0.{part} has {len(whole)} tokens, expected {sum(sizes)} by the config"
                )
            return list(whole.split(sizes))

        if table.plain:
            (self.ours["output_bias"],) = layers("bias")
            if not table.tied:
                (self.ours["output.weight"],) = layers("weight")
            return
        for index, bias in enumerate(layers("bias")):
            self.ours[f"output.biases.{index}"] = bias
        if not table.tied:
            for index, weight in enumerate(layers("weight")):
                self.ours[f"output.tables.{index}.weight"] = weight
        if clusters > 1:
            self.move("output.cluster.weight", "crit.cluster_weight")
            self.move("output.cluster_bias", "crit.cluster_bias")
        for index in range(clusters):
            name = f"output.projections.{index}.weight"
            if name in self.names:
                self.ours[name] = self._map(index).T

    def _map(self, index: int) -> Tensor:
        """Return the output projection (dim, width) of a cluster: its own, or the embedding's if they are tied."""
        if self.table.tied_maps[index]:
            return self.ours[f"embedding.projections.{0 if self.table.has_one_table else index}.weight"]
        return self.take(f"crit.out_projs.{index}")

    def _unused(self, name: str) -> bool:
        """Whether an output weight is tied, so that transformers overwrites it with the embedding's."""
        if name.startswith("crit.out_layers."):
            return self.table.tied and name.endswith(".weight")
        tied = [f"crit.out_projs.{index}" for index, is_tied in enumerate(self.table.tied_maps) if is_tied]
        return self.table.has_projections and name in tied
