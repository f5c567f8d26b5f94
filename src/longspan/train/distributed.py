"""Processes that train one model together (torchrun): gloo on CPUs, nccl on GPUs, and nothing at all when alone.

Gradients are summed, not averaged: every process divides its loss by the number of predictions of all of them, so the
sum is the gradient of the run that one process would have made of the same lanes.
"""

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan import host
from longspan.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """The processes of a run; with `world_size` 1 every method is the identity."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes, in fp64."""
        if self.world_size == 1:
            return list(values)
        device = self.device if host.has_float64(self.device) else torch.device("cpu")
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        result: list[float] = tensor.tolist()
        return result

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        """Wait for all."""
        self.any(False)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor (same shape everywhere) of every process, in order of rank."""
        if self.world_size == 1:
            return [tensor]
        here = tensor.to(self.device)
        gathered = [torch.empty_like(here) for _ in range(self.world_size)]
        dist.all_gather(gathered, here)
        return [part.to(tensor.device) for part in gathered]

    def share_parameters(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one."""
        if self.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, 0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes, in one exchange for each floating-point type; a parameter without a
        gradient here counts as zero if another process has one.
        """
        if self.world_size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        used = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=self.device)
        dist.all_reduce(used)
        trained = [parameter for parameter, count in zip(trained, used.tolist(), strict=True) if count]
        for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
            same = [parameter for parameter in trained if parameter.dtype == dtype]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in same]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for parameter, part in zip(same, parts, strict=True):
                parameter.grad = part.view_as(parameter)


def join_group(device: str = "auto") -> Group:
    """The group of this process: torchrun's where its environment is there, alone otherwise.

    The connection is made once and stays until the process ends: made anew for a second run, it may wait for ever for
    the store of the first. A program that has a connection of its own keeps it. `device`: see `choose_device`.
    """
    if "RANK" not in os.environ and not dist.is_initialized():
        return Group(device=choose_device(device))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return Group(dist.get_rank(), dist.get_world_size(), chosen)


def choose_device(name: str, local_rank: int = 0, what: str = "train.device") -> torch.device:
    """The device of a name: `"auto"` (CUDA where there is one), or what torch calls it; `local_rank` says which CUDA
    device is meant. A ConfigError, which names the setting `what`, where torch does not know or reach it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{what} = {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ConfigError(f"{what} = {name!r}: a device without values computes nothing; choose cpu or cuda")
    return device
