"""Watches how large the tensors are that operations make."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Mode: Any = TorchDispatchMode  # torch leaves its initializer untyped


class LargestTensor(_Mode):  # type: ignore[misc]
    """Context that records the number of elements of the largest tensor made inside, backward passes included.

    Views count, with the elements that they show.
    """

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out
