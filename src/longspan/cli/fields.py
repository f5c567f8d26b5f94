"""What the fields of configurations mean, read from their docstrings."""

import ast
import dataclasses
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

from longspan.config import nearest
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.report import Table


def field_table(config: type[Any], caption: str = "") -> "Table":
    """Return a table of the fields of a dataclass with their defaults and meanings."""
    from longspan.report import Table

    meanings = field_meanings(config)
    rows = [(field.name, _default(field), meanings.get(field.name, "")) for field in dataclasses.fields(config)]
    return Table(columns=("field", "default", "meaning"), rows=rows, caption=caption)


def field_meanings(config: type[Any]) -> dict[str, str]:
    """Return the meaning of each field of a dataclass, those of its base classes included.

    A field is described in the section `Attributes:` of the docstring, or by a string right below it.
    """
    meanings: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        if dataclasses.is_dataclass(base):
            meanings |= _attributes(base.__doc__ or "") | _strings_below(base)
    return meanings


def _attributes(docstring: str) -> dict[str, str]:
    """Parse the section `Attributes:` of a docstring: the description of each field, by name."""
    meanings: dict[str, str] = {}
    key, indent = "", None
    for line in docstring.partition("Attributes:")[2].splitlines():
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        if depth == indent:
            key, _, text = line.strip().partition(":")
            meanings[key] = text.strip()
        else:
            meanings[key] += f" {line.strip()}"
    return meanings


def _strings_below(config: type[Any]) -> dict[str, str]:
    """Return the strings right below the fields of a class, by field."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef), "a dataclass is a class"
    meanings = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        described = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if described and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            meanings[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return meanings


def _default(field: "dataclasses.Field[Any]") -> str:
    """Return the default of a field as TOML would have it, nearly; "required" if there is none."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def recipe_tables() -> dict[str, type[Any]]:
    """Return the configurations behind the tables of a recipe, by the name of the table and its kind."""
    from longspan import tasks
    from longspan.models.config import DecoderConfig, EncoderConfig, RecurrentConfig
    from longspan.train.config import StageConfig, TrainConfig
    from longspan.train.copy_curriculum import CopyCurriculumConfig
    from longspan.train.memory_curriculum import MemoryCurriculumConfig
    from longspan.train.passkey_curriculum import PasskeyCurriculumConfig

    return {
        "model": DecoderConfig,
        "model.encoder": EncoderConfig,
        "model.memory": RecurrentConfig,
        **{f"task.{name}": tasks.config_class(name) for name in tasks.names()},
        "train": TrainConfig,
        "train.stages": StageConfig,
        "train.memory": MemoryCurriculumConfig,
        "train.passkey": PasskeyCurriculumConfig,
        "train.copy": CopyCurriculumConfig,
    }


def recipe_table(name: str) -> "Table":
    """Return the fields of a table of a recipe; raises ConfigError for an unknown one."""
    tables = recipe_tables()
    if name not in tables:
        raise ConfigError(f"--fields {name!r}: must be one of {', '.join(tables)}{nearest(name, list(tables))}")
    return field_table(tables[name], caption=f"Table {name.partition('.')[0]}: {tables[name].__name__}.")
