"""Dtypes of sums over a stream, and their smallest denominators; shared by `linear`, `performer` and `infini`."""

import torch

from longspan import host


def smallest(dtype: torch.dtype) -> float:
    """Return the limit below which denominators count as zero: 4e-31 in fp32, 6e-247 in fp64.

    It is far above the smallest number of the dtype, because gradients are divided by a denominator too: they would
    overflow, and infinity times an empty memory is NaN.
    """
    return float(pow(torch.finfo(dtype).tiny, 0.8))


def sums_dtype(device: torch.device | str | None) -> torch.dtype:
    """Return the dtype of sums over a whole stream: fp64, or fp32 on devices without fp64 (Apple's GPUs)."""
    where = torch.get_default_device() if device is None else torch.device(device)
    return torch.float64 if host.has_float64(where) else torch.float32
