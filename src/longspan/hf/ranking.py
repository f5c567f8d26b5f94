"""Which layers are worth keeping: what the conversion of each layer alone does to the predictions, before any training.

The model reads some text with one converted layer, while all others compute their pretrained attention. The layers
before it then compute what they always do, so their outputs are computed once, and a model of L layers takes the time
of about L / 2 readings.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.errors import ConfigError, DataError
from longspan.hf.distillation import CHUNK
from longspan.hf.families import layers_name
from longspan.hf.transfer_layer import seeded
from longspan.models.head import final_logits, linear_head

if TYPE_CHECKING:
    from longspan.hf.transfer import Batch, Transfer

_ROUNDING = 1e-9
"""Divergence in nats per token, below which predictions are the same."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What the conversion of one layer alone costs, in nats per token."""

    layer: int
    divergence: float
    """Kullback-Leibler divergence of the model's next-token distributions from the pretrained model's"""
    loss_increase: float
    """by how much the loss is larger; below 0 where the text happens to favor the conversion"""


@dataclass(frozen=True, kw_only=True)
class LayerRanking:
    """The layers of a conversion by what they cost.

    Attributes:
        costs: largest divergence first.
        tokens: number of predictions that were compared.
    """

    costs: tuple[LayerCost, ...]
    tokens: int

    def costliest(self, count: int) -> tuple[int, ...]:
        """Return the indices of the `count` layers with the largest divergence, sorted."""
        return tuple(sorted(cost.layer for cost in self.costs[:count]))

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking as plain data for JSON."""
        return {"tokens": self.tokens, "costs": [asdict(cost) for cost in self.costs]}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "LayerRanking":
        """Return the ranking from what `to_dict` returned."""
        return cls(costs=tuple(LayerCost(**cost) for cost in record["costs"]), tokens=record["tokens"])


def automatic(layers: Iterable[int] | str | None) -> int:
    """Return N of `layers = "auto:N"`, the number of layers that keep softmax; 0 for any other choice of layers.

    Raises:
        ConfigError: another string.
    """
    if not isinstance(layers, str):
        return 0
    if (match := re.fullmatch(r"auto:([1-9]\d*)", layers)) is None:
        raise ConfigError(f"layers = {layers!r}: expected indices, or auto:N to keep softmax in the N costliest layers")
    return int(match[1])


def check_automatic(count: int, num_layers: int) -> None:
    """Raise a ConfigError if keeping softmax in `count` layers would leave no layer converted."""
    if count >= num_layers:
        raise ConfigError(
            f"layers = 'auto:{count}': must be from auto:1 to auto:{num_layers - 1}, so that a layer is left"
        )


@torch.no_grad()
def rank_layers(transfer: "Transfer", batches: Iterable["Batch"]) -> LayerRanking:
    """Measure what the conversion of each layer alone costs.

    Args:
        transfer: of a converted model; its layers are ranked.
        batches: text, in pieces that are longer than a segment or a window of the mechanism.

    Raises:
        DataError: there is no text, or the conversion of no layer changes a prediction on it.
        UnsupportedError: the model has no linear output layer.
    """
    model = transfer.model
    head = linear_head(model.get_output_embeddings(), final_logits(model.config))
    blocks = list(model.get_submodule(layers_name(model)).children())
    sums, tokens = {index: torch.zeros(2, dtype=torch.float64) for index in transfer.layers}, 0
    for layer in transfer.layers.values():
        layer.core.eval()
    for batch in batches:
        arguments = transfer.arguments(batch)
        outputs = list[Any]()
        with transfer.substituted({}), _recording(blocks, outputs):
            original = transfer.last_hidden(arguments)
        graded = _graded(arguments)
        targets = arguments["input_ids"][:, 1:][graded]
        tokens += len(targets)
        for index, layer in transfer.layers.items():
            student = functools.partial(layer.student, [])
            with (
                transfer.substituted({index: student}),
                _replaying(blocks, outputs[:index]),
                seeded(0, original.device),
            ):
                changed = transfer.last_hidden(arguments)
            sums[index] += _differences(head, original[:, :-1][graded], changed[:, :-1][graded], targets)
    if not tokens:
        raise DataError("layers = 'auto:N': no text to rank the layers on; give more text")
    means = {index: (total / tokens).tolist() for index, total in sums.items()}
    if max(divergence for divergence, _ in means.values()) < _ROUNDING:
        raise DataError(
            "layers = 'auto:N': the conversion changes no prediction on this text; use pieces longer than its segment "
            "or window"
        )
    costs = [LayerCost(layer=index, divergence=mean[0], loss_increase=mean[1]) for index, mean in means.items()]
    return LayerRanking(costs=tuple(sorted(costs, key=lambda cost: -cost.divergence)), tokens=tokens)


def _graded(arguments: dict[str, Any]) -> Tensor:
    """Return which tokens, (rows, length - 1) bool, are followed by a token of the same document."""
    tokens, mask, reset = (arguments.get(name) for name in ("input_ids", "attention_mask", "reset"))
    assert tokens is not None
    graded = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    if mask is not None:
        graded &= mask[:, :-1].bool() & mask[:, 1:].bool()
    return graded if reset is None else graded & ~reset[:, 1:]


def _differences(head: Any, original: Tensor, changed: Tensor, targets: Tensor) -> Tensor:
    """Return the divergence and the increase of the loss, summed over tokens, (2,) fp64.

    Args:
        head: output layer.
        original, changed: (tokens, dim) last hidden states.
        targets: (tokens,) token ids that follow.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for before, after, target in zip(*(part.split(CHUNK) for part in (original, changed, targets)), strict=True):
        wide = torch.promote_types(before.dtype, torch.float32)
        expected, ours = (F.log_softmax(head.logits(hidden), -1, dtype=wide) for hidden in (before, after))
        divergence = F.kl_div(ours, expected, reduction="sum", log_target=True)
        # negative log-likelihoods, so the difference is that of the losses
        losses = [F.nll_loss(scores, target, reduction="sum") for scores in (ours, expected)]
        sums += torch.stack([divergence, losses[0] - losses[1]]).double().cpu()
    return sums


@contextlib.contextmanager
def _recording(blocks: Sequence[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Context in which the outputs of layers are appended to `outputs`."""
    handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _replaying(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Context in which the first layers return recorded outputs instead of computing them."""
    # a hook of accelerate may have set one on the instance
    replaced = [(block, block.__dict__.get("forward")) for block in blocks[: len(outputs)]]
    try:
        for (block, _), output in zip(replaced, outputs, strict=True):
            block.__dict__["forward"] = functools.partial(_return_recorded, output)
        yield
    finally:
        for block, forward in replaced:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def _return_recorded(output: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return a recorded output, whatever a layer is called with."""
    return output
