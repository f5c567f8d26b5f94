"""Attention transfer: teach the converted layers of a pretrained model what its own attention computes.

In each converted layer, on the input that the layer has in the pretrained model, with the q, k and v made from it,

    target   o*_i = sum over j <= i of softmax_j(R_i q_i . R_j k_j / sqrt(d)) v_j
    student  o_i  = the mechanism's output

and one of two losses teaches the student (Zhang et al. 2024, "LoLCATs", arXiv:2410.10254; Goldstein et al. 2025,
"RADLADS", arXiv:2505.03005):

    heads    mean (o - o*)^2; only the mechanism's own parameters learn
    outputs  mean_i |W_o o_i - W*_o o*_i| / sqrt(dim); the projections learn too, from a frozen copy of themselves

The next layer receives the target, not the student's output. So layers are independent: each makes its backward pass
and its optimizer step inside its forward pass, the graph of a single layer exists at a time, and the result for a layer
is the same whichever other layers are trained. A loss on attention weights (Hedgehog) is not implemented, because
mechanisms have no common way to compute their weights with gradients.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from longspan.config import to_dict
from longspan.contract.maps import device_and_dtype
from longspan.contract.registry import build_mechanism
from longspan.errors import ConfigError, DataError
from longspan.hf.convert import revert
from longspan.hf.distillation import next_token_divergence, output_layer
from longspan.hf.families import attention_modules
from longspan.hf.opening import convert_exactly, exact_mechanisms
from longspan.hf.ranking import LayerRanking, automatic, check_automatic, rank_layers
from longspan.hf.transfer_layer import ErrorSums, Loss, TransferConfig, TransferLayer, seeded
from longspan.models.wrappers import unwrapped

Batch = Tensor | Mapping[str, Any]
"""Token ids (rows, length), or keyword arguments of the model: `input_ids`, `attention_mask`, `reset`."""
_HELD_OUT_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """Result of a transfer.

    Attributes:
        config: of the transfer.
        before, after: relative error by layer on held-out pieces: |o - o*|^2 / |o*|^2, summed over tokens, of the
            outputs that the loss compares.
        softmax_layers: layers that compute softmax again, because they cost most (`costs`), or because their errors
            were the largest.
        divergence: divergence of the model's predictions from the pretrained model's on held-out pieces, in nats per
            token, before and after distillation; None = no distillation.
        costs: what the conversion of each layer alone costs before any training; None = layers were not "auto:N".
    """

    config: TransferConfig
    before: dict[int, float]
    after: dict[int, float]
    softmax_layers: tuple[int, ...] = ()
    divergence: tuple[float, float] | None = None
    costs: LayerRanking | None = None

    @property
    def ranking(self) -> list[int]:
        """The layers by their error after the transfer, largest first."""
        return sorted(self.after, key=lambda layer: -self.after[layer])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        layers = [
            {"layer": layer, "error_before": self.before[layer], "error_after": self.after[layer]}
            for layer in sorted(self.after)
        ]
        rest: dict[str, Any] = {
            "ranking": self.ranking,
            "softmax_layers": self.softmax_layers,
            "divergence": self.divergence,
        }
        if self.costs is not None:
            rest["costs"] = self.costs.to_dict()
        return {"config": to_dict(self.config), "layers": layers, **to_dict(rest)}

    def __str__(self) -> str:
        """Return a one-line summary for printing."""
        count = len(self.after)
        before, after = (sum(errors.values()) / count for errors in (self.before, self.after))
        worst = self.ranking[0]
        return (
            f"{count} layers, {self.config.steps} steps: mean relative error of {self.config.loss} {before:.4g} "
            f"before, {after:.4g} after, {self.after[worst]:.4g} in the worst layer, {worst}"
        )


class Transfer:
    """Teaches converted layers; use it as a context manager, because it changes the model until its end.

    Args:
        model: a converted causal model of transformers, without adapters. Only what the loss says is changed.
        config: of the transfer; None = its layers are only compared with their teachers (`longspan.hf.ranking`).
        layers: converted layers to teach, negative ones counting from the end; None = all converted ones. Others
            compute what their pretrained attention does.

    Raises:
        ConfigError: the model, or one of the layers, is not converted; or the mechanism has nothing to learn.
        UnsupportedError: the model is bidirectional, has adapters or quantized projections.
    """

    def __init__(self, model: Any, config: TransferConfig | None, layers: Iterable[int] | None = None) -> None:
        self.model, self._config = unwrapped(model), config
        modules = self._modules = attention_modules(self.model)
        self._base = modules.family.base(self.model)
        chosen = _chosen(layers, modules.cores, len(modules.attentions))
        exact = exact_mechanisms(self.model)
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._all: dict[int, TransferLayer] = {}
        self.model.requires_grad_(False)
        try:
            for index in modules.cores:
                attention = modules.attentions[index]
                shape = modules.family.shape(self.model, attention)
                teacher = build_mechanism(exact[index].name, shape, exact[index].fields, f"layer {index}")
                teacher.to(device_and_dtype(attention).device)
                own_config = config if index in chosen else None
                self._all[index] = TransferLayer(index, attention, modules.family, teacher, own_config)
        except BaseException:
            self.finish()
            raise
        self.layers = {index: self._all[index] for index in chosen}
        self.model.eval()

    @property
    def config(self) -> TransferConfig:
        """The configuration of the current phase: the transfer, or the distillation after it."""
        assert self._config is not None
        return self._config

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Return weights to their dtypes, and the model to its mode and its flags of trained parameters."""
        for layer in self._all.values():
            layer.finish()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode

    def step(self, batch: Batch) -> dict[int, float]:
        """Make one optimizer step in every layer, and return the losses by layer.

        Raises:
            LongspanError: a gradient is not finite.
        """
        self._run(batch, {index: layer.learn for index, layer in self.layers.items()})
        return {index: layer.loss for index, layer in self.layers.items()}

    def errors(self, batches: Iterable[Batch]) -> dict[int, float]:
        """Return the relative error by layer on some batches."""
        for layer in self.layers.values():
            layer.sums = ErrorSums()
        for batch in batches:
            self._run(batch, {index: layer.measure for index, layer in self.layers.items()})
        return {index: layer.sums.relative for index, layer in self.layers.items()}

    @torch.no_grad()
    def _run(self, batch: Batch, substitutes: dict[int, Callable[..., Tensor]]) -> None:
        """Run the model up to the last trained layer, with other computations in its converted layers."""
        last = max(self.layers)

        def end_after(x: Tensor, rows: Any) -> Tensor:
            """Run the last layer, and end the forward pass, of which nothing else is needed."""
            substitutes[last](x, rows)
            raise _PassEnds

        with self.substituted({**substitutes, last: end_after}), contextlib.suppress(_PassEnds):
            self._base(**self.arguments(batch), use_cache=False)

    @contextlib.contextmanager
    def substituted(self, substitutes: Mapping[int, Callable[..., Tensor]]) -> Iterator[None]:
        """Context in which the converted layers compute `substitutes`, and those without one what their teachers do."""
        attentions = {index: layer.attention for index, layer in self._all.items()}
        try:
            for index, attention in attentions.items():
                attention.__dict__["longspan_substitute"] = substitutes.get(index, self._all[index].teach)
            yield
        finally:
            for attention in attentions.values():
                attention.__dict__.pop("longspan_substitute", None)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Return a batch as keyword arguments of the model, on its device."""
        named: Mapping[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        if "input_ids" not in named or named["input_ids"].ndim != 2:
            raise DataError("transfer: a batch must be token ids (rows, length), or a dict with such `input_ids`")
        device = self.model.get_input_embeddings().weight.device
        return {name: value.to(device) for name, value in named.items() if value is not None}

    def last_hidden(self, arguments: Mapping[str, Any]) -> Tensor:
        """Return the last hidden states (rows, length, dim) of the model for what `arguments` returned."""
        hidden: Tensor = self._base(**arguments, use_cache=False).last_hidden_state
        return hidden

    # -- distillation ------------------------------------------------------------------------------------------------

    def begin_distillation(self, steps: int) -> None:
        """Start a second phase, of calls of `distill`: new optimizers, a tenth of the learning rate on a cosine."""
        lr = self.config.base_lr / 10
        self._config = replace(self.config, steps=steps, lr=lr, schedule="cosine", seed=self.config.seed + 1)
        for layer in self.layers.values():
            layer.begin(self._config)

    def distill(self, batch: Batch) -> float:
        """Make one optimizer step in all taught layers together, on the divergence of the model's predictions.

        Returns:
            The Kullback-Leibler divergence of the student's next-token distributions from the teacher's, in nats, mean
            over tokens.

        Raises:
            LongspanError: a gradient is not finite.
            UnsupportedError: the model has no linear output layer.
        """
        for layer in self.layers.values():
            layer.core.train()
        with torch.enable_grad():
            divergence, aux_losses = self._divergence(batch)
            torch.stack([divergence, *aux_losses]).sum().backward()
        for layer in self.layers.values():
            layer.update()
        return float(divergence.detach())

    @torch.no_grad()
    def divergence(self, batches: Iterable[Batch]) -> float:
        """Return the mean of the divergences of some batches, without a step."""
        for layer in self.layers.values():
            layer.core.eval()
        values = [float(self._divergence(batch)[0]) for batch in batches]
        return sum(values) / len(values) if values else math.nan

    def _divergence(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return the divergence of a batch, and the auxiliary losses of the mechanisms."""
        arguments, aux_losses = self.arguments(batch), list[Tensor]()
        with torch.no_grad(), self.substituted({}):
            teacher = self.last_hidden(arguments)
        students = {index: functools.partial(layer.student, aux_losses) for index, layer in self._all.items()}
        seed = next(iter(self.layers.values())).seed
        with seeded(seed, teacher.device), self.substituted(students):
            student = self.last_hidden(arguments)
        mask = arguments.get("attention_mask")
        real = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if mask is None else mask.bool()
        return next_token_divergence(self.model, teacher[real], student[real]), aux_losses

    # -- saving ------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and optimizer moments of all layers, by name."""
        return {
            f"{index}.{name}": tensor
            for index, layer in self.layers.items()
            for name, tensor in layer.tensors().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps with the tensors that `tensors` returned then."""
        for index, layer in self.layers.items():
            prefix = f"{index}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            layer.load_tensors(own, step)

    def restore_softmax(self, layers: Sequence[int]) -> None:
        """Give layers their pretrained attention back and stop training them: projections as they were, and `full` (or
        `window`) as the mechanism, so that the model still streams.
        """
        for index in layers:
            layer = self.layers.pop(index)
            layer.restore_projections()
            layer.finish()
            del self._all[index]
        if layers:
            revert(self.model, layers)
            convert_exactly(self.model, layers)


class _PassEnds(Exception):
    """Ends a forward pass of which nothing else is needed."""


def _chosen(layers: Iterable[int] | None, cores: Mapping[int, Any], count: int) -> list[int]:
    """Return the sorted indices of the layers to teach; raises ConfigError if one is not converted."""
    if not cores:
        raise ConfigError("transfer: the model is not converted; call longspan.hf.convert(model, MIXER) first")
    if layers is None:
        return sorted(cores)
    chosen = sorted({index + count if index < 0 else index for index in layers})
    wrong = [index for index in chosen if index not in cores]
    if wrong or not chosen:
        names = ", ".join(str(index) for index in sorted(cores))
        raise ConfigError(f"transfer: layers = {chosen}: must be among the converted layers {names}")
    return chosen


def transfer(
    model: Any,
    data: Iterable[Batch],
    *,
    loss: Loss = "heads",
    steps: int = 1000,
    lr: float | None = None,
    layers: Iterable[int] | str | None = None,
    held_out: Sequence[Batch] | None = None,
    clip: float = 1.0,
    seed: int = 0,
    keep_softmax: int = 0,
    distill: int = 0,
    on_step: Callable[[int, dict[int, float]], object] | None = None,
) -> TransferReport:
    """Teach the converted layers of a pretrained model, in place, what its own attention computes.

    The model must have its pretrained projections: convert it, transfer, then train further. `longspan transfer` does
    the same on text files, with checkpoints.

    Args:
        model: a causal model that `convert` changed.
        data: batches, one per step: token ids (rows, length), or dicts of `input_ids`, `attention_mask` (padding is
            left out of the loss) and `reset` (documents in one row).
        loss: "heads" or "outputs"; the module describes them.
        steps: number of optimizer steps; AdamW without weight decay.
        lr: learning rate; None = 1e-2 for heads, where it is constant, and 1e-3 for outputs, where it falls along a
            cosine to a hundredth.
        layers: converted layers to teach; None = all. The result for a layer does not depend on the others. "auto:N" =
            all but the N layers whose conversion costs most by `rank_layers` on `held_out`, before any step; these get
            their pretrained attention back.
        held_out: batches on which errors are measured; None = the first four of `data`, which are then not learned.
        clip: largest norm of the gradient of a layer; 0 = no clipping.
        seed: of dropout in mechanisms and of redrawn projections.
        keep_softmax: number of layers, those with the largest errors, that get their pretrained attention back.
        distill: number of steps afterwards, on the divergence of the model's predictions from the pretrained model's;
            these hold the graph of all layers.
        on_step: called with the number of steps done and the losses by layer, except in distillation.

    Returns:
        The relative errors before and after, and with "auto:N" the ranking of all layers.

    Raises:
        ConfigError: the model is not converted, the mechanism has no parameters for loss "heads", or a wrong setting.
        DataError: `data` has too few batches, one has a wrong form, or the mechanism has nothing to learn on them.
        UnsupportedError: the model is bidirectional, has adapters or quantized projections.
        LongspanError: a gradient is not finite.
    """
    config = TransferConfig(loss=loss, steps=steps, lr=lr, clip=clip, seed=seed)
    batches, num_softmax, ranking = iter(data), automatic(layers), None
    with Transfer(model, config, None if isinstance(layers, str) else layers) as taught:
        check_automatic(num_softmax, len(taught.layers))
        check_kept(keep_softmax, len(taught.layers) - num_softmax)
        held_out = list(islice(batches, _HELD_OUT_BATCHES)) if held_out is None else held_out
        if num_softmax:
            ranking = rank_layers(taught, held_out)
            taught.restore_softmax(ranking.costliest(num_softmax))
        before = taught.errors(held_out)
        check_errors(model, before)
        if distill:
            output_layer(taught.model)
        for step, batch in enumerate(_exactly(batches, steps), 1):
            losses = taught.step(batch)
            if on_step is not None:
                on_step(step, losses)
        report = TransferReport(
            config=config,
            before=before,
            after=taught.errors(held_out),
            softmax_layers=() if ranking is None else ranking.costliest(num_softmax),
            costs=ranking,
        )
        report = keep_worst(taught, report, keep_softmax)
        if not distill:
            return report
        divergence = taught.divergence(held_out)
        taught.begin_distillation(distill)
        for batch in _exactly(batches, distill):
            taught.distill(batch)
        return replace(report, divergence=(divergence, taught.divergence(held_out)))


def _exactly(batches: Iterator[Batch], steps: int) -> Iterator[Batch]:
    """Yield a number of batches; raises DataError if there are fewer."""
    for step in range(steps):
        try:
            batch = next(batches)
        except StopIteration:
            message = f"the data ended after {step} of {steps} steps; give more batches, or fewer steps"
            raise DataError(f"transfer: {message}") from None
        yield batch


def check_kept(keep_softmax: int, num_layers: int) -> None:
    """Raise a ConfigError if `keep_softmax` is not a number of layers that leaves at least one taught."""
    if not 0 <= keep_softmax < num_layers:
        raise ConfigError(f"transfer: keep_softmax = {keep_softmax}: must be from 0 to {num_layers - 1}")


def keep_worst(taught: Transfer, report: TransferReport, count: int) -> TransferReport:
    """Give the `count` layers with the largest errors their pretrained attention back; return the report with them."""
    worst = sorted(report.ranking[:count])
    taught.restore_softmax(worst)
    return replace(report, softmax_layers=tuple(sorted({*report.softmax_layers, *worst})))


def check_errors(model: Any, errors: Mapping[int, float]) -> None:
    """Check that there is something to learn.

    Args:
        model: a converted model.
        errors: relative errors by layer before the transfer.

    Raises:
        DataError: there are no held-out tokens, or no layer's error exceeds rounding, for example because pieces are
            not longer than a segment or a window.
    """
    if not errors or any(math.isnan(error) for error in errors.values()):
        raise DataError("transfer: no held-out tokens to measure errors on; give more text")
    rounding = max(1e-12, torch.finfo(device_and_dtype(unwrapped(model)).dtype).eps ** 2)
    if max(errors.values()) < rounding:
        raise DataError(
            "transfer: the mechanism already computes what attention does on these pieces (relative error "
            f"{max(errors.values()):.1g}); use pieces longer than its segment or window"
        )
