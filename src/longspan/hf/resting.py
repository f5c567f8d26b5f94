"""Keep weights of a converted layer that its mechanism does not use, so that `revert` can restore them.

If queries also serve as keys (shared `lsh` and `routing`), the key projection is never called. It stays with the
attention, and is saved and moved with it, but is not a submodule, so that no optimizer, adapter or
DistributedDataParallel sees it.
"""

from typing import Any

from torch import nn

_UNUSED = "longspan_resting"


class KeepsUnusedModules(nn.Module):
    """Mixin placed before the class of an attention module, which moves, saves and loads its unused modules."""

    @property
    def _unused_modules(self) -> dict[str, nn.Module]:
        """The modules that were set aside, by name."""
        return {name: self.__dict__[name] for name in self.__dict__.get(_UNUSED, {}).get("trained", ())}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the module and its unused modules."""
        for module in self._unused_modules.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the module and its unused modules."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, module in self._unused_modules.items():
            module.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the module and its unused modules."""
        for name, module in self._unused_modules.items():
            module._load_from_state_dict(state_dict, f"{prefix}{name}.", *args)
        starts = tuple(f"{prefix}{name}." for name in self._unused_modules)
        rest = {key: value for key, value in state_dict.items() if not (starts and key.startswith(starts))}
        super()._load_from_state_dict(rest, prefix, *args)


def set_aside_modules(attention: Any, names: tuple[str, ...]) -> None:
    """Freeze submodules of an attention and remove them from its submodules, keeping them as plain attributes."""
    unused: dict[str, Any] = {"order": list(attention._modules), "trained": {}}
    for name in names:
        if name in attention._modules:
            module = attention._modules.pop(name)
            unused["trained"][name] = [parameter.requires_grad for parameter in module.parameters()]
            attention.__dict__[name] = module.requires_grad_(False)
    attention.__dict__[_UNUSED] = unused


def restore_modules(attention: Any) -> None:
    """Make the unused modules submodules again, in their order and as trainable as before."""
    unused = attention.__dict__.pop(_UNUSED, None)
    if unused is None:
        return
    for name, trained in unused["trained"].items():
        module = attention.__dict__.pop(name)
        attention.add_module(name, module)
        for parameter, before in zip(module.parameters(), trained, strict=True):
            parameter.requires_grad_(before)
    modules = attention._modules
    known = [name for name in unused["order"] if name in modules]
    for name in [*known, *(name for name in modules if name not in known)]:
        modules[name] = modules.pop(name)
