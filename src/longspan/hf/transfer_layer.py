"""One converted layer in an attention transfer: what its own softmax attention computes, and what its mechanism does.

The teacher is exact attention (`full`, or `window` where the pretrained layer has a sliding window) with the layer's
own projections; the student is the mechanism. If the projections are trained too, the teacher keeps a frozen copy.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longspan.config import check_least
from longspan.contract.base import Hidden, Mechanism, optimizer_groups
from longspan.errors import ConfigError, LongspanError, UnsupportedError
from longspan.hf.converted_config import CORE
from longspan.hf.families import Family
from longspan.hf.families.base import Projected
from longspan.mixers import BatchLayout

Loss = Literal["heads", "outputs"]
DEFAULT_LR: dict[Loss, float] = {"heads": 1e-2, "outputs": 1e-3}


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """How layers are taught."""

    loss: Loss = "heads"
    """heads: mean squared error of the outputs of heads, and only parameters of the mechanism learn; outputs: length of
    the difference of the layer's outputs divided by the square root of their width (not squared), mean over tokens, and
    the projections learn too"""
    steps: int = 1000
    """number of optimizer steps (AdamW without weight decay)"""
    lr: float | None = None
    """learning rate; None: 1e-2 for heads and 1e-3 for outputs. With outputs, gates and other parameters to which
    mechanisms give a rate of their own start at that"""
    schedule: Literal["constant", "cosine"] | None = None
    """how the learning rate changes; cosine: it falls to a hundredth; None: constant for heads, cosine for outputs"""
    clip: float = 1.0
    """largest norm of the gradient of a layer; 0: no clipping"""
    seed: int = 0
    """of the order of the data, of dropout in mechanisms, and of redrawn projections"""

    def __post_init__(self) -> None:
        if self.loss not in DEFAULT_LR:
            raise ConfigError(f"transfer.loss = {self.loss!r}: must be 'heads' or 'outputs'")
        if self.schedule not in (None, "constant", "cosine"):
            raise ConfigError(f"transfer.schedule = {self.schedule!r}: must be 'constant' or 'cosine'")
        check_least(self, "transfer", {"steps": 1, "clip": 0, "seed": 0})
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"transfer.lr = {self.lr}: must be a number above 0")

    @property
    def base_lr(self) -> float:
        """The learning rate of the first step."""
        return DEFAULT_LR[self.loss] if self.lr is None else self.lr

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates in step `step` (from 0)."""
        if self.schedule == "constant" or (self.schedule is None and self.loss == "heads"):
            return 1.0
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass
class ErrorSums:
    """Sums over tokens from which a relative error is computed."""

    difference: float = 0.0
    target: float = 0.0

    @property
    def relative(self) -> float:
        """The squared difference divided by the squared target."""
        return self.difference / self.target if self.target else math.nan


class TransferLayer:
    """A converted attention module, its teacher, and the optimizer of its trained parameters.

    The methods `teach`, `learn` and `measure` take the layer's inputs x (B, N, dim), gathered by `rows`, and return
    the teacher's outputs (B, N, dim); `student` returns those of the mechanism.

    Args:
        index: of the layer.
        attention: the converted module; its trained parameters are in fp32 at least until `finish`.
        family: of its model.
        exact: the mechanism that equals its pretrained attention.
        config: of the transfer; None: the layer only teaches. The caller has frozen all parameters of the model.

    Raises:
        ConfigError: with loss "heads", the mechanism has no parameters.
        UnsupportedError: adapters wrap the mechanism, or weights that would be trained are quantized.
    """

    def __init__(
        self, index: int, attention: Any, family: Family, exact: Mechanism, config: TransferConfig | None
    ) -> None:
        self.index, self.attention, self.family, self.exact, self.config = index, attention, family, exact, config
        self.teacher, self.core = attention, attention.longspan
        self.step, self.loss, self.sums = 0, math.nan, ErrorSums()
        self.trained: dict[str, nn.Parameter] = {}
        if not isinstance(self.core, Mechanism):
            raise UnsupportedError("transfer: the model has adapters; transfer first and add adapters afterwards")
        if config is None:
            return
        core_parameters = {f"{CORE}.{name}": parameter for name, parameter in self.core.named_parameters()}
        self.trained = core_parameters if config.loss == "heads" else dict(attention.named_parameters())
        if not self.trained:
            raise ConfigError(
                f"transfer.loss = 'heads': {type(self.core).__name__} has no parameters to learn; use loss 'outputs', "
                "which trains the projections"
            )
        if not all(parameter.is_floating_point() for parameter in self.trained.values()):
            raise UnsupportedError(
                "transfer.loss = 'outputs': the projections of this model are quantized, so they cannot be trained; "
                "use loss 'heads', or a model with floating-point weights"
            )
        self._dtypes = {name: parameter.dtype for name, parameter in self.trained.items()}
        if config.loss == "outputs":
            self.teacher = copy.deepcopy(attention)
            delattr(self.teacher, CORE)
            self.teacher.requires_grad_(False)
        for parameter in self.trained.values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)
        self.begin(config)

    def begin(self, config: TransferConfig) -> None:
        """Start at step 0 with a new optimizer: AdamW without weight decay."""
        parameters = list(self.trained.values())
        groups = (
            [{"params": parameters, "lr": config.base_lr}]
            if config.loss == "heads"
            else optimizer_groups(parameters, [], [self.core], lr=config.base_lr, weight_decay=0.0)
        )
        self.config, self.step = config, 0
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]

    # -- forward passes ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def teach(self, x: Tensor, rows: BatchLayout) -> Tensor:
        """Return the teacher's outputs."""
        heads, projected = self._exact_heads(x, rows)
        return self.family.output(self.teacher, heads, projected.gate)

    def learn(self, x: Tensor, rows: BatchLayout) -> Tensor:
        """Make one optimizer step on the layer's inputs, and return the teacher's outputs."""
        assert self.config is not None
        heads, projected = self._exact_heads(x, rows)
        with torch.no_grad():
            outputs = self.family.output(self.teacher, heads, projected.gate)
        self.core.train()
        with seeded(self.seed, x.device), torch.enable_grad():
            aux_losses: list[Tensor] = []
            if self.config.loss == "heads":
                difference = _real(self._student_heads(x, projected, rows, aux_losses) - heads, rows)
                loss = difference.float().square().mean()
            else:
                difference = _real((self._student_outputs(x, rows, aux_losses) - outputs)[:, None], rows)
                loss = torch.linalg.vector_norm(difference.float(), dim=-1).mean() / x.shape[-1] ** 0.5
            self.loss = float(loss.detach())
            if loss.requires_grad:
                torch.stack([loss, *aux_losses]).sum().backward()
        self.update()
        return outputs

    @torch.no_grad()
    def measure(self, x: Tensor, rows: BatchLayout) -> Tensor:
        """Add the student's error to `sums`, over heads or layer outputs as the loss says; return the teacher's
        outputs.
        """
        assert self.config is not None
        heads, projected = self._exact_heads(x, rows)
        outputs = self.family.output(self.teacher, heads, projected.gate)
        self.core.eval()
        if self.config.loss == "heads":
            ours, target = self._student_heads(x, projected, rows, []), heads
        else:
            ours, target = self._student_outputs(x, rows, [])[:, None], outputs[:, None]
        self.sums.difference += float(_real(ours - target, rows).double().square().sum())
        self.sums.target += float(_real(target, rows).double().square().sum())
        return outputs

    def student(self, aux_losses: list[Tensor], x: Tensor, rows: BatchLayout) -> Tensor:
        """Return the mechanism's outputs, with a graph if gradients are enabled; auxiliary losses are appended."""
        return self._student_outputs(x, rows, aux_losses).to(x.dtype)

    @torch.no_grad()
    def _exact_heads(self, x: Tensor, rows: BatchLayout) -> tuple[Tensor, Projected]:
        """Return the teacher's outputs of heads (B, heads, N, head_dim), and its projections."""
        projected = self.family.projected(self.teacher, x)
        return self.exact.run(projected.q, projected.k, projected.v, None, rows)[0].to(x.dtype), projected

    def _student_heads(self, x: Tensor, projected: Projected, rows: BatchLayout, aux_losses: list[Tensor]) -> Tensor:
        """Return the mechanism's outputs of heads (B, heads, N, head_dim) for q, k, v; x as they were made from."""
        hidden = Hidden(x, self.attention.longspan_keys_values) if self.core.traits.receives_hidden else None
        q, k, v, _ = projected
        out: Tensor = self.core.run(q, k, v, None, rows, hidden=hidden, aux_losses=aux_losses)[0]
        return out

    def _student_outputs(self, x: Tensor, rows: BatchLayout, aux_losses: list[Tensor]) -> Tensor:
        """Return the mechanism's layer outputs (B, N, dim), in the dtype of the trained projections."""
        if self.config is not None and self.config.loss == "outputs":
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        projected = self.family.projected(self.attention, x, self.core.traits.uses_keys)
        heads = self._student_heads(x, projected, rows, aux_losses).to(x.dtype)
        return self.family.output(self.attention, heads, projected.gate)

    # -- optimizer steps ---------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """The seed of the current step and layer, so that neither other layers nor a restart change it."""
        assert self.config is not None
        return (self.config.seed * 1_000_003 + self.step) * 10_007 + self.index

    def update(self) -> None:
        """Clip the gradients, update the parameters, and apply what the mechanism does after a step.

        Raises:
            LongspanError: the loss or the gradient is not finite; the parameters are unchanged.
        """
        assert self.config is not None
        parameters = list(self.trained.values())
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf))
        if not math.isfinite(norm):
            raise LongspanError(
                f"transfer: the gradient of layer {self.index} is not finite at step {self.step + 1}; lower lr"
            )
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * self.config.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # the fused step of torch does not increment the version counters by which caches notice changed weights
        torch.autograd.graph.increment_version(parameters)
        self.core.after_step(self.step + 1, torch.Generator().manual_seed(self.seed))
        self.step += 1

    # -- saving ------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Return the trained parameters and the buffers of the mechanism, by name inside the attention module."""
        saved = self.core.state_dict()
        buffers = {f"{CORE}.{name}": buffer for name, buffer in self.core.named_buffers() if name in saved}
        return {name: parameter.detach() for name, parameter in self.trained.items()} | buffers

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a restart needs: weights and optimizer moments, by name."""
        moments = {
            f"optimizer.{key}.{name}": moment
            for name, parameter in self.trained.items()
            for key, moment in self.optimizer.state.get(parameter, {}).items()
        }
        return {f"weights.{name}": weight for name, weight in self.weights().items()} | moments

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Restore what `tensors` returned after `step` steps."""
        weights = self.weights()
        for path, tensor in tensors.items():
            kind, rest = path.split(".", 1)
            if kind == "weights":
                weights[rest].copy_(tensor)
            else:
                key, name = rest.split(".", 1)
                parameter = self.trained[name]
                self.optimizer.state[parameter][key] = tensor.to(parameter.device)
        self.step = step

    @torch.no_grad()
    def restore_projections(self) -> None:
        """Write the pretrained projections back, where they were trained."""
        originals = dict(self.teacher.named_parameters())
        for name, parameter in self.trained.items():
            if name in originals and parameter is not originals[name]:
                parameter.copy_(originals[name])

    def finish(self) -> None:
        """Return trained parameters to the dtypes that they had before."""
        for name, parameter in self.trained.items():
            parameter.data = parameter.data.to(self._dtypes[name])
            parameter.grad = None


def _real(values: Tensor, rows: BatchLayout) -> Tensor:
    """Return the values (B, heads, N, width) of real tokens: (tokens, heads, width)."""
    values = values.transpose(1, 2)
    return values.flatten(0, 1) if rows.lengths is None else values[rows.real_columns()]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators in the context, and restore them on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
