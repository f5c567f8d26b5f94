"""Output heads of language models: logits, or losses without materializing logits."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.contract.maps import is_plain
from longspan.errors import UnsupportedError


class Softmax(NamedTuple):
    """One softmax over `hidden @ weight.T + bias`, whose loss is a part of the loss of a head.

    Attributes:
        hidden: (rows, width).
        weight: (classes, width).
        bias: (classes,) or None.
        targets: (rows,) int64, the class of each row.
        rows: (rows,) int64, indices of these rows among the head's hidden states; None = all, in order.
        call: a function from hidden states to logits, used instead of `weight` and `bias`, which are then None.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    targets: Tensor
    rows: Tensor | None = None
    call: Callable[[Tensor], Tensor] | None = None


class Head(NamedTuple):
    """A linear output head: maps the hidden states of a model's `hidden` to logits `hidden @ weight.T + bias`.

    Attributes:
        weight: (vocab_size, dim).
        bias: (vocab_size,) or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., dim) to logits (..., vocab_size)."""
        return F.linear(hidden, self.weight, self.bias)

    def softmaxes(self, hidden: Tensor, targets: Tensor) -> list[Softmax]:
        """Return the softmaxes whose losses add up to the loss of the targets: here a single one.

        Args:
            hidden: (rows, dim).
            targets: (rows,) token ids.
        """
        return [Softmax(hidden, self.weight, self.bias, targets)]


class CalledHead:
    """An output head whose linear map is called, because it is more than its weight (adapters, hooks, quantization).

    A bias (vocab_size,) may be added to its output.
    """

    def __init__(self, linear: nn.Module, bias: Tensor | None = None) -> None:
        self.linear, self.bias = linear, bias

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., dim) to logits (..., vocab_size)."""
        logits: Tensor = self.linear(hidden)
        return logits if self.bias is None else logits + self.bias

    def softmaxes(self, hidden: Tensor, targets: Tensor) -> list[Softmax]:
        """Return the softmaxes whose losses add up to the loss of targets (rows,) for hidden (rows, dim):
        a single one.
        """
        return [Softmax(hidden, None, None, targets, call=self.logits)]


def head_of(linear: nn.Module, bias: Tensor | None = None) -> "Head | CalledHead":
    """Return the head of a linear map: a `Head` if it is a plain one, so that products and losses can be fused."""
    return Head(cast(Tensor, linear.weight), bias) if is_plain(linear) else CalledHead(linear, bias)


class AdaptiveHead(NamedTuple):
    """An adaptive softmax (Grave et al. 2017).

    Frequent tokens and one class per cluster of rarer tokens share a first softmax, and every cluster has its own over
    narrower hidden states::

        p(token) = softmax(first)[token]                                          in cluster 0
                   softmax(first)[cluster i] softmax(W_i M_i h + b_i)[token]      in cluster i > 0
        first    = [W_0 M_0 h + b_0, V M_0 h + c]

    Its logits are these log-probabilities, so they can be used wherever logits are. Losses of given tokens are computed
    by `softmaxes`, which only does the work of the clusters of these tokens.

    Attributes:
        cuts: 0, the first token of every cluster but the first, vocab_size.
        weights: W_i (tokens, width) of each cluster.
        biases: b_i (tokens,) or None.
        maps: M_i (width, dim) from hidden states to the width of the cluster; None = no map.
        cluster_weight: V (clusters - 1, width of the first); None with a single cluster.
        cluster_bias: c (clusters - 1,) or None.
    """

    cuts: tuple[int, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    maps: tuple[Tensor | None, ...]
    cluster_weight: Tensor | None = None
    cluster_bias: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., dim) to log-probabilities (..., vocab_size), computed in fp32 at least."""
        narrow = self._narrowed(hidden)
        first = F.linear(narrow[0], self.weights[0], self.biases[0])
        if self.cluster_weight is not None:
            # two products, because joining the weights would copy them for every token of a stream
            first = torch.cat([first, F.linear(narrow[0], self.cluster_weight, self.cluster_bias)], -1)
        first = _log_softmax(first)
        parts = [first[..., : self.cuts[1]]]
        for index in range(1, len(self.weights)):
            own = _log_softmax(F.linear(narrow[index], self.weights[index], self.biases[index]))
            parts.append(own + first[..., self.cuts[1] + index - 1, None])
        return torch.cat(parts, -1).to(hidden.dtype)

    def softmaxes(self, hidden: Tensor, targets: Tensor) -> list[Softmax]:
        """Return the softmaxes whose losses add up to the loss of the targets.

        The first softmax covers all rows, each cluster's softmax the rows whose target is in that cluster.

        Args:
            hidden: (rows, dim).
            targets: (rows,) token ids.
        """
        inner = torch.tensor(self.cuts[1:-1], dtype=torch.int64, device=targets.device)
        cluster = torch.bucketize(targets, inner, right=True)
        weight, bias = self.weights[0], self.biases[0]
        if self.cluster_weight is not None:
            weight = torch.cat([weight, self.cluster_weight])
            bias = None if bias is None or self.cluster_bias is None else torch.cat([bias, self.cluster_bias])
        classes = torch.where(cluster == 0, targets, self.cuts[1] + cluster - 1)
        parts = [Softmax(_mapped(hidden, self.maps[0]), weight, bias, classes)]
        for index in range(1, len(self.weights)):
            rows = (cluster == index).nonzero()[:, 0]
            narrow = _mapped(hidden[rows], self.maps[index])
            classes = targets[rows] - self.cuts[index]
            parts.append(Softmax(narrow, self.weights[index], self.biases[index], classes, rows))
        return parts

    def _narrowed(self, hidden: Tensor) -> list[Tensor]:
        """Return hidden states in the width of every cluster; a map that clusters share is applied once."""
        narrow: dict[int, Tensor] = {}
        for weight in self.maps:
            if id(weight) not in narrow:
                narrow[id(weight)] = _mapped(hidden, weight)
        return [narrow[id(weight)] for weight in self.maps]


def _mapped(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """Apply a map to hidden states; unchanged if it is None."""
    return hidden if weight is None else F.linear(hidden, weight)


def _log_softmax(logits: Tensor) -> Tensor:
    """Return log-softmax over the last dimension in fp32 at least."""
    return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


class ChangedHead(CalledHead):
    """An output head whose outputs are capped or scaled before they are logits (Gemma 2, Granite).

    Args:
        head: a linear map.
        change: maps its outputs to logits of the same shape.
    """

    def __init__(self, head: Head | CalledHead, change: Callable[[Tensor], Tensor]) -> None:
        self.head, self.change = head, change

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., dim) to logits (..., vocab_size)."""
        return self.change(self.head.logits(hidden))


LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Fields by which configurations of transformers cap or scale the outputs of the head."""


def final_logits(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what a foreign model does to the outputs of its head: Gemma caps them, Granite and Cohere scale them.

    Args:
        config: configuration of a transformers model.

    Returns:
        A function from outputs to logits of the same shape; None = the outputs are the logits.
    """
    cap, factor, divisor = (getattr(config, name, None) for name in LOGIT_FIELDS)
    if cap is not None:
        return lambda outputs: (outputs / cap).tanh() * cap
    factor, divisor = factor or 1.0, divisor or 1.0
    return None if factor == divisor == 1 else lambda outputs: outputs * (factor / divisor)


def linear_head(module: Any, change: Callable[[Tensor], Tensor] | None = None) -> Head | CalledHead:
    """Return the head of a foreign model's output layer, adapters included.

    Args:
        module: the output layer.
        change: what the model does to its outputs, by `final_logits`.

    Raises:
        UnsupportedError: the layer is not a linear map.
    """
    if not (isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")):
        layer = "no output layer" if module is None else f"an output layer of type {type(module).__name__}"
        raise UnsupportedError(
            f"computing the loss in chunks needs a linear output layer; this model has {layer}; set loss_chunk = 0"
        )
    plain = is_plain(module)
    head = Head(cast(Tensor, module.weight), cast("Tensor | None", module.bias)) if plain else CalledHead(module)
    return head if change is None else ChangedHead(head, change)
