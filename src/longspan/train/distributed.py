"""Data-parallel training with torchrun: gloo on CPUs, nccl on GPUs, no communication for a single process.

Gradients are summed, not averaged: every process divides its loss by the number of predictions of all processes, so the
sum equals the gradient of one process that trains on all lanes.
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
    """The processes of a run, and the collective operations between them; with one process these do nothing."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this is the main process, which logs and saves."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all processes, in fp64."""
        if self.world_size == 1 or not values:
            return list(values)
        device = self.device if host.has_float64(self.device) else torch.device("cpu")
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        result: list[float] = tensor.tolist()
        return result

    def any(self, flag: bool) -> bool:
        """Return whether the flag is True in any process."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes (of the same shape) in order of rank, on the device of `tensor`."""
        if self.world_size == 1:
            return [tensor]
        here = tensor.to(self.device)
        gathered = [torch.empty_like(here) for _ in range(self.world_size)]
        dist.all_gather(gathered, here)
        return [part.to(tensor.device) for part in gathered]

    def share_parameters(self, model: nn.Module) -> None:
        """Copy the parameters and buffers of process 0 to all processes."""
        if self.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, 0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes in place, with one all-reduce per dtype.

        A parameter without a gradient counts as zero if it has one in another process.
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
    """Return the process group: that of torchrun if its environment variables are set, else this process alone.

    The connection is initialized once and stays until the process ends: a second initialization may wait forever for
    the store of the first. A connection that the program has initialized itself is used as it is.

    Args:
        device: name of the device, see `choose_device`.
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
    """Return the torch device of a name.

    Args:
        name: `"auto"` (CUDA if available, else the CPU) or a torch device such as `"cuda:1"`.
        local_rank: index of the CUDA device for `"auto"` and `"cuda"`.
        what: setting to name in the error.

    Raises:
        ConfigError: torch does not know or cannot use the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{what} = {name!r}: {str(error).splitlines()[0]}; choose cpu or another device") from None
    if device.type == "meta":
        raise ConfigError(f"{what} = {name!r}: tensors on this device have no values; choose cpu or cuda")
    return device
