from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

import longspan as ls
from longspan.config import from_dict, override, read_toml, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int = 10
    inner: Inner = field(default_factory=Inner)
    parts: tuple[dict[str, Any], ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    name: str | None = None


def test_round_trip() -> None:
    config = Outer(steps=3, inner=Inner(rate=0.5, kind="b"), parts=({"name": "x", "n": 1},), name="run")
    assert from_dict(Outer, to_dict(config)) == config


def test_every_default_round_trips() -> None:
    for cls in (Outer, ls.DecoderConfig, ls.EncoderConfig):
        assert from_dict(cls, to_dict(cls())) == cls()


def test_whole_numbers_serve_as_floats_but_not_the_reverse() -> None:
    assert from_dict(Inner, {"rate": 1}).rate == 1.0
    with pytest.raises(ls.ConfigError, match=r"Outer.steps: expected int, got 1.5"):
        from_dict(Outer, {"steps": 1.5})
    with pytest.raises(ls.ConfigError, match="expected int, got True"):
        from_dict(Outer, {"steps": True})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stesp": 1}, "run: unknown field 'stesp'; did you mean 'steps'"),
        ({"inner": {"kind": "c"}}, "run.inner.kind = 'c' is not one of 'a', 'b'"),
        ({"inner": 3}, "run.inner: expected a table of fields, got 3"),
        ({"sizes": 3}, "run.sizes: expected a list, got 3"),
        ({"sizes": [1, "x"]}, r"run.sizes\[1\]: expected int, got 'x'"),
        ({"name": 3}, "run.name: expected str, got 3"),
    ],
)
def test_errors_name_the_field(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ls.ConfigError, match=message):
        from_dict(Outer, data, "run")


def test_override() -> None:
    data = {"train": {"steps": 1}, "model": {"mixers": [{"name": "full"}, {"name": "window"}]}}
    assert override(data, "train.steps=5")["train"]["steps"] == 5
    assert override(data, "train.lr=1e-3")["train"]["lr"] == 1e-3
    assert override(data, "task.source=some/file.txt")["task"] == {"source": "some/file.txt"}
    assert override(data, "model.mixers.1.window=64")["model"]["mixers"][1] == {"name": "window", "window": 64}
    assert data["train"] == {"steps": 1}, "the data given stays as it is"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.steps", "expected a.b=c"),
        ("=3", "expected a.b=c"),
        ("train.steps.x=3", "train.steps is a value, not a table"),
        ("model.mixers.7.window=3", "'7' is not an index of a list of length 1"),
    ],
)
def test_wrong_overrides_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(ls.ConfigError, match=message):
        override({"train": {"steps": 1}, "model": {"mixers": [{}]}}, assignment)


def test_toml_that_is_missing_or_broken(tmp_path: Any) -> None:
    with pytest.raises(ls.ConfigError, match="no such file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 3")
    with pytest.raises(ls.ConfigError, match="cannot be read as TOML"):
        read_toml(tmp_path / "bad.toml")
