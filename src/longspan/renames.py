"""Public names of version 0.1 that changed in 0.2: the old ones work until 0.4, with a `DeprecationWarning`.

Everything that knows an old name reads it here, so that 0.4 drops them by dropping this file and what imports it.
"""

import contextlib
import contextvars
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from longspan.errors import ConfigError

REMOVED_IN = "0.4"


class RenamedWarning(DeprecationWarning):
    """A name of an earlier version was used; its message says the present one."""


NAMES: dict[str, dict[str, str]] = {
    "longspan.mixers": {
        "Core": "Mechanism",
        "Rows": "BatchLayout",
        "Segments": "SegmentLayout",
        "with_penalties": "with_aux_losses",
    },
    "longspan.hf": {"cores": "mechanisms", "penalties": "aux_losses"},
    "longspan.train": {
        "Answers": "MemoryEvaluation",
        "Curriculum": "MemoryCurriculum",
        "CurriculumConfig": "MemoryCurriculumConfig",
        "Depths": "PasskeyEvaluation",
        "Live": "LiveDisplay",
        "Plain": "PlainDisplay",
        "RetrievalConfig": "PasskeyCurriculumConfig",
        "Silent": "Display",
        "evaluate_answers": "evaluate_memory",
        "evaluate_depths": "evaluate_passkey",
    },
}
"""By module: old to new names of classes and functions."""

_NORMALIZER = {"normaliser": "normalizer"}
_INCLUDE_SELF = {"itself": "include_self"}
_AUX_LOSSES = {"penalties": "aux_losses"}
KEYWORDS: dict[str, dict[str, str]] = {
    "associative_read": _NORMALIZER,
    "associative_write": _NORMALIZER,
    "compressive_attention": {"stale": "detached_kv"},
    "group_attention": _INCLUDE_SELF,
    "group_attention_cost": _INCLUDE_SELF,
    "infini_attention": _NORMALIZER,
    "infini_open": _NORMALIZER,
    "lsh_cost": {"shared": "shared_qk"},
    "orthogonal_projection": {"regularised": "regularized"},
    "push_rings": {"kept": "in_last_document", "goes_on": "continues_document"},
    "relative_attention": {"border": "segment_start", "stale": "detached_kv"},
    "routing_attention": _INCLUDE_SELF,
    "routing_cost": {**_INCLUDE_SELF, "shared": "shared_qk"},
    "with_aux_losses": _AUX_LOSSES,
    "register": {"core_class": "mechanism_class"},
    "Mixer.forward": _AUX_LOSSES,
    "Decoder.forward": {**_AUX_LOSSES, "give": "output"},
    "Encoder.forward": _AUX_LOSSES,
    "MaskedLM.forward": {**_AUX_LOSSES, "give": "output"},
    "RecurrentMemory.forward": _AUX_LOSSES,
    "RecurrentMemory.run": _AUX_LOSSES,
    "RecurrentClassifier.forward": _AUX_LOSSES,
}
"""By function of `longspan.ops` and `longspan.reference`, of `longspan.mixers`, or by method: old to new keywords."""

UNWRAPPED = ("Decoder.forward",)
"""Methods that take old keywords themselves, as every token goes through them: see `keywords`."""

_REDRAWN = ("Mechanism", "Mixer", "Stack", "RecurrentMemory", "RecurrentClassifier", "ConvertedDecoder")
ATTRIBUTES: dict[str, dict[str, str]] = {name: {"draw": "redraw_count"} for name in _REDRAWN}
"""By class: old to new attributes."""

MIXERS = {"heads": "mixed_heads"}
"""Old to new names of mechanisms."""

FIELDS: dict[str, dict[str, str]] = {
    "infini": _NORMALIZER,
    "lsh": {"redraw": "redraw_every", "shared": "shared_qk"},
    "mixed_heads": {"parts": "mixers"},
    "performer": {"redraw": "redraw_every", "regularised": "regularized"},
    "routing": {"shared": "shared_qk"},
    "transformer_xl": {"memory": "cache"},
}
"""By mechanism: old to new fields."""

VALUES: dict[str, dict[str, str]] = {
    "model.positions": {"factorised": "factorized"},
    "train.curriculum": {"retrieval": "passkey"},
}
"""By field of a recipe or a model: old to new values."""

_reading_saved: contextvars.ContextVar[bool] = contextvars.ContextVar("longspan_reading_saved", default=False)


@contextlib.contextmanager
def reading_saved() -> Iterator[None]:
    """Suppress warnings about old names while the context is open: a file of an earlier version is being read."""
    token = _reading_saved.set(True)
    try:
        yield
    finally:
        _reading_saved.reset(token)


def warn(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that `old` is now called `new`.

    Args:
        old: the old name as a user writes it, with what it belongs to, such as `q.w: 'penalties'`.
        new: the present name.
        stacklevel: as of `warnings.warn`, counted from the caller.
    """
    if not _reading_saved.get():
        message = f"{old} is now {new}; the old name works until version {REMOVED_IN}"
        warnings.warn(message, RenamedWarning, stacklevel=stacklevel + 1)


def value(field: str, given: Any) -> Any:
    """Return the present name of a value of `field`, such as `model.positions`; an old name warns."""
    new = VALUES[field].get(given) if isinstance(given, str) else None
    if new is None:
        return given
    warn(f"{field} = {given!r}", repr(new), stacklevel=3)
    return new


def mixer(name: str) -> str:
    """Return the present name of a mechanism; an old name warns."""
    new = MIXERS.get(name)
    if new is None:
        return name
    warn(f"the mixer {name!r}", repr(new), stacklevel=3)
    return new


def fields(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the mechanism `name` under their present names; nested `mixers` too.

    Raises:
        ConfigError: a field is given under both names.
    """
    current = renamed(FIELDS.get(name, {}), given, name)
    if name == "mixed_heads" and isinstance(current.get("mixers"), list | tuple):
        current["mixers"] = tuple(table(part) for part in current["mixers"])
    return current


def table(given: Any) -> Any:
    """Return a mechanism's table (its fields and its `name`) under present names; anything else unchanged."""
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        return given
    name = mixer(given["name"])
    return {"name": name, **fields(name, {key: value for key, value in given.items() if key != "name"})}


def renamed(
    new_of_old: Mapping[str, str], given: Mapping[str, Any], where: str, *, stacklevel: int = 4
) -> dict[str, Any]:
    """Return `given` with old keys replaced by present ones, in the same order; each old key warns.

    Args:
        new_of_old: old to new keys.
        given: fields or keyword arguments.
        where: what they belong to, for messages.
        stacklevel: as of `warn`.

    Raises:
        ConfigError: something is given under both names.
    """
    current: dict[str, Any] = {}
    for key, item in given.items():
        new = new_of_old.get(key, key)
        if new != key:
            if new in given:
                raise ConfigError(f"{where}: {key!r} is the old name of {new!r}, which is also set; leave {key!r} out")
            warn(f"{where}: {key!r}", repr(new), stacklevel=stacklevel)
        current[new] = item
    return current


def model(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's table with its mixers and positions under present names."""
    current = dict(given)
    if isinstance(current.get("mixers"), list | tuple):
        current["mixers"] = [table(mixer) for mixer in current["mixers"]]
    if "positions" in current:
        current["positions"] = value("model.positions", current["positions"])
    return current


def recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the fields of its model and its training under present names."""
    current = dict(given)
    if isinstance(current.get("model"), Mapping):
        current["model"] = model(current["model"])
    train = current.get("train")
    if isinstance(train, Mapping) and "curriculum" in train:
        current["train"] = {**train, "curriculum": value("train.curriculum", train["curriculum"])}
    return current


def recorded(given: Any) -> Any:
    """Return a model's table under the names of version 0.1, for digests that do not change with names.

    Args:
        given: a model's table, or a list or value inside it.
    """
    if isinstance(given, list | tuple):
        return [recorded(item) for item in given]
    if not isinstance(given, Mapping):
        return given
    old_of_new = {new: old for old, new in FIELDS.get(str(given.get("name")), {}).items()}
    old = {old_of_new.get(key, key): recorded(item) for key, item in given.items()}
    for field, names in (("positions", VALUES["model.positions"]), ("name", MIXERS)):
        if field in old:
            old[field] = {new: former for former, new in names.items()}.get(old[field], old[field])
    return old


def accept_old_names(namespace: Any) -> None:
    """Make the functions and classes of a module accept their old keywords and have their old attributes, too.

    Args:
        namespace: `globals()` of the module, changed in place: functions and methods in `KEYWORDS` are wrapped, and
            classes in `ATTRIBUTES` get properties, which their subclasses inherit. Entries of both tables that the
            module does not have are skipped.
    """
    for name, new_of_old in ATTRIBUTES.items():
        for old, new in new_of_old.items() if isinstance(namespace.get(name), type) else ():
            setattr(namespace[name], old, _old_attribute(name, old, new))
    for path, new_of_old in KEYWORDS.items():
        if path in UNWRAPPED:
            continue
        owner, _, method = path.rpartition(".")
        if not owner and path in namespace:
            namespace[path] = _with_old_keywords(namespace[path], new_of_old, path)
        elif isinstance(namespace.get(owner), type):
            cls = namespace[owner]
            setattr(cls, method, _with_old_keywords(getattr(cls, method), new_of_old, path))


def keywords(where: str, call: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a call of a method that is not wrapped, `old` ones under their present names.

    Args:
        where: the method, a key of `KEYWORDS`.
        call: its present keywords; None where one was not given.
        old: keywords that the method does not have.

    Raises:
        TypeError: one of `old` is not an old name.
        ConfigError: a keyword is given under both names.
    """
    if unknown := old.keys() - KEYWORDS[where]:
        raise TypeError(f"{where}() got an unexpected keyword argument {min(unknown)!r}")
    present = {key: item for key, item in call.items() if item is not None}
    return renamed(KEYWORDS[where], {**present, **old}, where)


def _old_attribute(owner: str, old: str, new: str) -> property:
    """Return a property that reads the attribute `new` and warns that its old name `old` was used."""

    def read(self: Any) -> Any:
        """Warn about the old name and return the attribute."""
        warn(f"{owner}.{old}", new)
        return getattr(self, new)

    return property(read, doc=f"Old name of `{new}`.")


def _with_old_keywords(function: Callable[..., Any], new_of_old: Mapping[str, str], where: str) -> Callable[..., Any]:
    """Wrap a function so that it also accepts keyword arguments by their old names, with a warning."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        """Call the wrapped function with old keywords replaced by present ones."""
        if not new_of_old.keys().isdisjoint(keywords):
            keywords = renamed(new_of_old, keywords, where, stacklevel=3)
        return function(*args, **keywords)

    return call


def with_current_keyword(cls: type, method: str, new_of_old: Mapping[str, str]) -> None:
    """Wrap a method of a class that was written for version 0.1, in place, so that present keywords reach it.

    Args:
        cls: class of a user or of another package.
        method: name of the method.
        new_of_old: old to new keywords; those that the method takes by their old names are translated.
    """
    function = getattr(cls, method)
    taken = inspect.signature(function).parameters
    old_of_new = {new: old for old, new in new_of_old.items() if old in taken and new not in taken}
    if not old_of_new:
        return
    for new, old in old_of_new.items():
        warn(f"{cls.__name__}.{method}: the argument {old!r}", repr(new), stacklevel=4)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        """Call the original method with present keywords replaced by the old ones that it takes."""
        return function(*args, **{old_of_new.get(key, key): item for key, item in keywords.items()})

    setattr(cls, method, call)


def old_names(
    module: str, namespace: Mapping[str, Any], otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module, so that its old names refer to the renamed objects, with a warning.

    Args:
        module: its `__name__`, a key of `NAMES`.
        namespace: its `globals()`.
        otherwise: called with attributes that are no old name; None: they raise AttributeError.

    Returns:
        A function of an attribute's name.
    """

    def find(name: str) -> Any:
        """Return what a module has under the present name of `name`, with a warning, or ask `otherwise`."""
        new = NAMES[module].get(name)
        if new is not None:
            warn(f"{module}.{name}", f"{module}.{new}", stacklevel=2)
            return namespace[new]
        if otherwise is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return otherwise(name)

    return find
