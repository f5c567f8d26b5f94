"""The types of sums over a stream, and what they are divided by: shared by `linear`, `performer` and `infini`."""

import torch

from longspan import host


def smallest(dtype: torch.dtype) -> float:
    """Denominators below it count as none: 4e-31 in fp32, 6e-247 in fp64.

    Far above the smallest number of the type, as gradients are divided by a denominator too: by the smallest number
    they would overflow, and infinity times an empty memory is NaN.
    """
    return float(pow(torch.finfo(dtype).tiny, 0.8))


def sums_dtype(device: torch.device | str | None) -> torch.dtype:
    """What sums over a whole stream are carried in: fp64, or fp32 where the device (as Apple's GPUs) has none."""
    where = torch.get_default_device() if device is None else torch.device(device)
    return torch.float64 if host.has_float64(where) else torch.float32
