"""One optimizer step: forward and backward over the segments of all lanes, gradients summed over processes, AdamW."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan import state as states
from longspan.errors import ConfigError, LongspanError
from longspan.mixers import with_aux_losses
from longspan.train.config import TrainConfig
from longspan.train.distributed import Group
from longspan.train.lanes import Batch
from longspan.train.loss import adaptive_head, chunked_next_token_loss, next_token_loss

# offsets of the seed, so that initialization, dropout and redraws of random features use separate random streams
_DROPOUT, _AFTER_STEP = 1, 2


class DivergedError(LongspanError):
    """Raised when the loss, the gradient norm or a parameter is not finite."""


class StepResult(NamedTuple):
    """Totals of a step over all processes."""

    nats: float
    """summed loss"""
    tokens: int
    """number of predictions that count"""
    units: int
    """bytes (or whatever the task counts) of their targets"""
    grad_norm: float
    """norm of the gradient before clipping"""

    @property
    def sums(self) -> dict[str, float]:
        """Amounts that are summed up for a line of the log."""
        return {"nats": self.nats, "units": self.units}


class Optimization:
    """AdamW with the base learning rates of its groups, the random generators of training, and the carried states.

    Args:
        model: with `parameter_groups` and `after_step`.
        config: `[train]` table of the run.
        group: processes of the run.
    """

    def __init__(self, model: Any, config: Any, group: Group) -> None:
        self.model, self.group, self._clip = model, group, config.clip or math.inf
        self.carried: list[Any] = []
        groups = model.parameter_groups(lr=config.lr, weight_decay=config.weight_decay)
        self.base_rates = [parameters["lr"] for parameters in groups]
        eps = getattr(config, "eps", 1e-8)
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=eps, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed + _AFTER_STEP)
        torch.manual_seed((config.seed + _DROPOUT) * 1_000_003 + group.rank)

    def begin(self) -> None:
        """Put the model into training mode and clear its gradients."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)

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
                self.optimizer.state[parameters[name]][key] = moment.clone().to(parameters[name].device)
        self.generator.set_state(tensors["random.after_step"])
        if (cpu := tensors.get(f"random.cpu.{self.group.rank}")) is not None:
            torch.set_rng_state(cpu)
        cuda = tensors.get(f"random.cuda.{self.group.rank}")
        if cuda is not None and self.group.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.group.device)


class Stepper(Optimization):
    """Trains a language model on batches and keeps the carried states; arguments are those of `Optimization`.

    Raises:
        ConfigError: processes x `accumulation` does not divide `lanes`, of `[train]` or of a stage.
        UnsupportedError: `loss_chunk` with a model whose output layer is not a linear map.
    """

    def __init__(self, model: Any, config: TrainConfig, group: Group) -> None:
        for index, stage in enumerate(config.stage_configs):
            if stage.lanes % (config.accumulation * group.world_size):
                where = "train" if config.stages is None else f"train.stages[{index}]"
                raise ConfigError(
                    f"{where}.lanes = {stage.lanes}: must be a multiple of {group.world_size} processes x "
                    f"train.accumulation = {config.accumulation}"
                )
        if config.loss_chunk:
            model.head()
        self.by_head = bool(config.loss_chunk) or adaptive_head(model) is not None
        super().__init__(model, config, group)
        self.begin_stage(config.stage_configs[0])

    def begin_stage(self, config: TrainConfig) -> None:
        """Make the following steps with the fields of a stage (of `stage_configs`), and drop the carried states."""
        self.config = config
        self.carry = config.carries and self.model.traits.streams
        self.carried = [None] * config.accumulation

    def step(self, batches: Sequence[Batch], *, step: int, rate: float) -> StepResult:
        """Make one optimizer step on `bptt_segments` consecutive segments of this process's lanes.

        Args:
            batches: the segments, one batch each.
            step: number of steps done before this one.
            rate: factor of the base learning rates.

        Raises:
            DivergedError: the loss or the gradient is not finite; the parameters are unchanged.
        """
        config, group = self.config, self.group
        own_tokens = sum(int(batch.graded.sum()) for batch in batches)
        own_units = sum(int(batch.sizes.sum()) for batch in batches)
        tokens, units = group.sum(own_tokens, own_units)
        self.begin()
        rows = batches[0].tokens.shape[0] // config.accumulation
        # an auxiliary loss is a mean over the tokens of a call, so a step takes the mean over its calls
        calls = len(batches) * config.accumulation * group.world_size
        nats = 0.0
        for index, state in enumerate(self.carried):
            losses, aux_losses = list[Tensor](), list[Tensor]()
            for batch in batches:
                part = batch.at(slice(index * rows, (index + 1) * rows)).to(group.device)
                layout = {"mask": part.mask, "reset": part.reset, "aux_losses": aux_losses}
                with self._autocast():
                    if self.by_head:
                        hidden, state = self.model.hidden(part.tokens, state, **layout)
                        head, chunk = self.model.head(), config.loss_chunk
                        loss = chunked_next_token_loss(hidden, head, part.targets, part.graded, chunk=chunk)
                    else:
                        logits, state = self.model(part.tokens, state, **layout)
                        loss = next_token_loss(logits, part.targets, part.graded)
                losses.append(loss)
                state = state if self.carry else None
            total = torch.stack(losses).sum()
            with_aux_losses(total / max(tokens, 1.0), aux_losses, calls).backward()
            # contiguous, like a state that was loaded: the last bit of a matrix product may depend on strides
            self.carried[index] = None if state is None else states.clone(states.detach(state))
            nats += float(total.detach())
        (nats,) = group.sum(nats)
        if not math.isfinite(nats):
            raise DivergedError(f"the loss of step {step + 1} is {nats}, not a finite number")
        group.sum_gradients(self.model.parameters())
        redraws = self.model.redraw_count
        norm = self.update(step, rate)
        if self.model.redraw_count != redraws:
            self.carried = [None] * config.accumulation
        return StepResult(nats, int(tokens), int(units), norm)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the forward pass: autocast for dtype bfloat16, else none."""
        if self.config.dtype == "bfloat16":
            return torch.autocast(self.group.device.type, torch.bfloat16)
        return contextlib.nullcontext()
