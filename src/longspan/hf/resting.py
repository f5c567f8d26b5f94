"""Weights of a converted layer that its mechanism does not use, kept for `revert`.

Where keys are queries (shared `lsh` and `routing`) nothing calls the projection to keys. It stays the attention's, is
saved with it and moves with it, but is no submodule: no optimiser, adapter or DistributedDataParallel meets it.
"""

from typing import Any

from torch import nn

_RESTING = "longspan_resting"


class Resting(nn.Module):
    """Stands before the class of an attention module some of whose modules may rest."""

    @property
    def _asleep(self) -> dict[str, nn.Module]:
        return {name: self.__dict__[name] for name in self.__dict__.get(_RESTING, {}).get("trained", ())}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for module in self._asleep.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, module in self._asleep.items():
            module.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, module in self._asleep.items():
            module._load_from_state_dict(state_dict, f"{prefix}{name}.", *args)
        starts = tuple(f"{prefix}{name}." for name in self._asleep)
        rest = {key: value for key, value in state_dict.items() if not (starts and key.startswith(starts))}
        super()._load_from_state_dict(rest, prefix, *args)


def put_aside(attention: Any, names: tuple[str, ...]) -> None:
    """Let modules of an attention rest, frozen."""
    resting: dict[str, Any] = {"order": list(attention._modules), "trained": {}}
    for name in names:
        if name in attention._modules:
            module = attention._modules.pop(name)
            resting["trained"][name] = [parameter.requires_grad for parameter in module.parameters()]
            attention.__dict__[name] = module.requires_grad_(False)
    attention.__dict__[_RESTING] = resting


def wake(attention: Any) -> None:
    """Make submodules again of what rests, trainable as it was."""
    resting = attention.__dict__.pop(_RESTING, None)
    if resting is None:
        return
    for name, trained in resting["trained"].items():
        module = attention.__dict__.pop(name)
        attention.add_module(name, module)
        for parameter, before in zip(module.parameters(), trained, strict=True):
            parameter.requires_grad_(before)
    modules = attention._modules
    known = [name for name in resting["order"] if name in modules]
    for name in [*known, *(name for name in modules if name not in known)]:
        modules[name] = modules.pop(name)
