"""One optimizer step: the losses of all parts of a batch, gradients summed over processes, AdamW."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.train.config import RunConfig
from longspan.train.distributed import Group
from longspan.train.source import BatchSource, StepResult

# offsets of the seed, so that initialization, dropout and redraws of random features use separate random streams
_DROPOUT, _AFTER_STEP = 1, 2


class DivergedError(LongspanError):
    """Raised when the loss, the gradient norm or a parameter is not finite."""


class Optimization:
    """AdamW with the base learning rates of its groups, and the random generators of training.

    Args:
        model: with `parameter_groups` and `after_step`.
        config: `[train]` table of the run.
        group: processes of the run.
    """

    def __init__(self, model: Any, config: RunConfig, group: Group) -> None:
        self.model, self.group, self._clip = model, group, config.clip or math.inf
        groups = model.parameter_groups(lr=config.lr, weight_decay=config.weight_decay)
        self.base_rates = [parameters["lr"] for parameters in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed + _AFTER_STEP)
        torch.manual_seed((config.seed + _DROPOUT) * 1_000_003 + group.rank)

    def begin(self) -> None:
        """Put the model into training mode and clear its gradients."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, source: BatchSource, step: int, rate: float) -> StepResult:
        """Make one optimizer step on the next batch of a source; every process calls it.

        Args:
            source: of the batch and its loss.
            step: number of steps done before this one.
            rate: factor of the base learning rates.

        Raises:
            DivergedError: the loss or the gradient is not finite; the parameters are unchanged.
        """
        batch = source.draw(step)
        self.begin()
        own = dict.fromkeys(source.sum_names, 0.0)
        for part in batch.parts:
            loss = source.loss(part)
            loss.total.backward()
            source.after_part(part)
            for name, amount in loss.sums.items():
                own[name] += float(amount)
        sums = dict(zip(own, self.group.sum(*own.values()), strict=True))
        loss_sum = sums[source.sum_names[0]]
        if not math.isfinite(loss_sum):
            raise DivergedError(f"the loss of step {step + 1} is {loss_sum}, not a finite number")
        self.group.sum_gradients(self.model.parameters())
        norm = self.update(step, rate)
        result = StepResult(sums=sums, tokens=batch.tokens, units=batch.units, grad_norm=norm)
        source.after_step(result)
        return result

    def update(self, step: int, rate: float) -> float:
        """Clip the gradients, update the parameters, and return the norm of the gradient before clipping.

        Args:
            step: number of steps done before this one.
            rate: factor of the base learning rates.

        Raises:
            DivergedError: the gradient is not finite; the parameters are unchanged.
        """
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._clip))
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient norm of step {step + 1} is {norm}, not a finite number")
        for parameters, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            parameters["lr"] = base * rate
        self.optimizer.step()
        # the fused step of torch does not increment the version counters by which caches notice changed weights
        torch.autograd.graph.increment_version([p for p in self.model.parameters() if p.requires_grad])
        self.model.after_step(step + 1, self.generator)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return optimizer moments and random generators of all processes, by name; every process calls it."""
        tensors = {
            f"optimizer.{key}.{name}": moment
            for name, parameter in self.model.named_parameters()
            for key, moment in self.optimizer.state.get(parameter, {}).items()
            if isinstance(moment, Tensor)
        }
        tensors["random.after_step"] = self.generator.get_state()
        states_of = {"cpu": torch.get_rng_state()}
        if self.group.device.type == "cuda":
            states_of["cuda"] = torch.cuda.get_rng_state(self.group.device)
        for kind, own in states_of.items():
            tensors |= {f"random.{kind}.{rank}": state for rank, state in enumerate(self.group.gather(own))}
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned; a process that did not exist then keeps the generator of its seed."""
        parameters = dict(self.model.named_parameters())
        for path, moment in tensors.items():
            kind, key, name = (*path.split(".", 2), "", "")[:3]
            # checkpoints of earlier versions may have parameters that no longer exist
            if kind == "optimizer" and name in parameters:
                self.optimizer.state[parameters[name]][key] = moment.to(parameters[name].device)
        self.generator.set_state(tensors["random.after_step"])
        if (cpu := tensors.get(f"random.cpu.{self.group.rank}")) is not None:
            torch.set_rng_state(cpu)
        cuda = tensors.get(f"random.cuda.{self.group.rank}")
        if cuda is not None and self.group.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.group.device)
