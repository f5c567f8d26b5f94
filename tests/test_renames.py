"""Every public name of 0.1 that changed still works, warns with the present name, and means the same."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import renames
from longspan.renames import FIELDS, KEYWORDS, NAMES, RenamedWarning
from longspan.train import resolve

SIZES: dict[str, Any] = {"dim": 16, "num_heads": 4}
OF_MODELS = ("Decoder", "Encoder", "MaskedLM", "RecurrentMemory", "RecurrentClassifier")
OLD_FIELDS: dict[str, dict[str, Any]] = {
    "infini": {"normaliser": "gamma"},
    "lsh": {"redraw": 7, "shared": False},
    "mixed_heads": {"parts": [{"name": "window", "num_heads": 2}, {"name": "lsh", "num_heads": 2, "shared": False}]},
    "performer": {"redraw": 7, "regularised": True},
    "routing": {"shared": False},
    "transformer_xl": {"memory": "kv"},
}


@pytest.mark.parametrize(("module", "old"), [(module, old) for module, names in NAMES.items() for old in names])
def test_an_old_name_is_the_new_object(module: str, old: str) -> None:
    if module == "longspan.hf":
        pytest.importorskip("transformers")
    package, new = importlib.import_module(module), NAMES[module][old]
    if old in package.__all__:  # the name of another object now
        assert getattr(package, old) is not getattr(package, new)
        return
    with pytest.warns(RenamedWarning, match=rf"{module}\.{old} is now {module}\.{new};.*until version 0\.4"):
        assert getattr(package, old) is getattr(package, new)
    assert new in package.__all__


def test_other_missing_names_are_attribute_errors() -> None:
    for module in NAMES:
        package = importlib.import_module(module)
        with pytest.raises(AttributeError, match="no attribute 'Missing'"):
            _ = package.Missing


def owner_of(path: str) -> Any:
    if path.startswith(OF_MODELS):
        return getattr(ls.models, path.partition(".")[0])
    if path.startswith(("Mixer.", "Mechanism.")):
        return getattr(ls.mixers, path.partition(".")[0])
    return ls.mixers if path in ls.mixers.__all__ else ls.ops


@pytest.mark.parametrize("path", KEYWORDS)
def test_new_keywords_are_those_of_the_function(path: str) -> None:
    function = getattr(owner_of(path), path.rpartition(".")[2])
    parameters = inspect.signature(function).parameters
    assert set(KEYWORDS[path].values()) <= parameters.keys()
    assert not KEYWORDS[path].keys() & parameters.keys()


@pytest.mark.parametrize("module", ["ops", "reference"])
def test_operations_take_old_keywords(module: str) -> None:
    functions: Any = getattr(ls, module)
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    gate = torch.zeros(2)
    with pytest.warns(RenamedWarning, match="infini_attention: 'normaliser' is now 'normalizer'"):
        old = functions.infini_attention(q, k, v, gate, segment=4, normaliser="gamma")
    new = functions.infini_attention(q, k, v, gate, segment=4, normalizer="gamma")
    assert all(torch.equal(*pair) for pair in zip(tensors(old), tensors(new), strict=True))
    groups = torch.zeros(1, 2, 8, dtype=torch.int64)
    group: dict[str, Any] = {"groups": groups, "num_groups": 1, "window": 3}
    with pytest.warns(RenamedWarning, match="group_attention: 'itself' is now 'include_self'"):
        old = functions.group_attention(q, k, v, **group, itself=False)
    new = functions.group_attention(q, k, v, **group, include_self=False)
    assert all(torch.equal(*pair) for pair in zip(tensors(old), tensors(new), strict=True))


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in tensors(part)]


def test_models_and_mixers_take_old_keywords() -> None:
    config = ls.DecoderConfig(vocab_size=7, dim=16, num_layers=1, num_heads=4, mixers=({"name": "adaptive_span"},))
    model, losses, tokens = ls.Decoder(config), list[Tensor](), torch.arange(6)[None]
    old: Any = {"penalties": losses}
    with pytest.warns(RenamedWarning, match=r"Decoder\.forward: 'penalties' is now 'aux_losses'"):
        model(tokens, **old)
    assert len(losses) == 1
    mixer = ls.mixers.build("adaptive_span", **SIZES)
    with pytest.warns(RenamedWarning, match=r"Mixer\.forward: 'penalties'"):
        mixer(torch.randn(1, 6, 16), **old)
    assert len(losses) == 2
    with pytest.raises(ls.ConfigError, match="'penalties' is the old name of 'aux_losses'"):
        model(tokens, **old, aux_losses=[])


def test_the_number_of_redraws_has_its_old_name() -> None:
    mixer: Any = ls.mixers.build("performer", **SIZES)
    model: Any = ls.Decoder(ls.DecoderConfig(vocab_size=7, dim=16, num_heads=4))
    memory: Any = ls.RecurrentMemory(model, num_memory_tokens=2, segment_length=4)
    for owner in (mixer, mixer.core, model, memory):
        with pytest.warns(RenamedWarning, match=r"\.draw is now redraw_count"):
            assert owner.draw == owner.redraw_count == 0


@pytest.mark.parametrize("name", FIELDS)
def test_mechanisms_take_old_fields(name: str) -> None:
    old = OLD_FIELDS[name]
    assert old.keys() == FIELDS[name].keys()
    with pytest.warns(RenamedWarning) as caught:
        mixer = ls.mixers.build(name, **SIZES, **old)
    messages = " ".join(str(warning.message) for warning in caught)
    for field, new in FIELDS[name].items():
        assert f"{name}: {field!r} is now {new!r}" in messages
        if field != "parts":
            assert getattr(mixer.core.config, new) == old[field]
    with pytest.raises(ls.ConfigError, match="unknown field"):
        ls.mixers.build(name, **SIZES | {next(iter(old)) + "x": 1})


def test_the_mixer_heads_is_mixed_heads() -> None:
    with pytest.warns(RenamedWarning, match="the mixer 'heads' is now 'mixed_heads'"):
        mixer = ls.mixers.build("heads", **SIZES)
    assert mixer.name == "mixed_heads"
    assert "heads" not in ls.mixers.names()


def test_recipes_take_old_names() -> None:
    old = {
        "model": {"positions": "factorised", "position_shape": [4, 4], "mixers": [{"name": "lsh", "shared": False}]},
        "train": {"curriculum": "retrieval"},
        "task": {"name": "passkey"},
    }
    with pytest.warns(RenamedWarning) as caught:
        recipe = resolve(old)
    assert len(caught) == 3
    assert recipe["model"]["positions"] == "factorized"
    assert recipe["model"]["mixers"] == [{"name": "lsh", "shared_qk": False}]
    assert recipe["train"]["curriculum"] == "passkey"
    shape: Any = {"positions": "factorised", "position_shape": (4, 4)}
    with pytest.warns(RenamedWarning, match="'factorised'"):
        assert ls.DecoderConfig(vocab_size=7, **shape).positions == "factorized"


def test_a_field_under_both_names_is_refused() -> None:
    with pytest.raises(ls.ConfigError, match="'redraw' is the old name of 'redraw_every', which is also set; leave"):
        ls.mixers.build("performer", **SIZES, redraw=1, redraw_every=2)


def test_a_model_has_one_hash_under_both_names() -> None:
    def hash_of(mixer: dict[str, Any]) -> str:
        torch.manual_seed(0)
        return ls.models.model_hash(ls.Decoder(ls.DecoderConfig(vocab_size=7, dim=16, num_heads=4, mixers=(mixer,))))

    with pytest.warns(RenamedWarning):
        old = hash_of({"name": "heads", "parts": OLD_FIELDS["mixed_heads"]["parts"]})
    parts = [{"name": "window", "num_heads": 2}, {"name": "lsh", "num_heads": 2, "shared_qk": False}]
    assert old == hash_of({"name": "mixed_heads", "mixers": parts})
    assert old != hash_of({"name": "mixed_heads", "mixers": [parts[0], {**parts[1], "shared_qk": True}]})


def test_mechanisms_written_for_an_earlier_version_are_called_by_its_keywords() -> None:
    full: Any = ls.mixers.build("full", **SIZES).core

    class Older(type(full)):  # type: ignore[misc]
        def forward(
            self, q: Tensor, k: Tensor, v: Tensor, state: Any, rows: Any, *, hidden: Any = None, penalties: Any = None
        ) -> Any:
            if penalties is not None:
                penalties.append(q.square().mean())
            return super().forward(q, k, v, state, rows)

    with pytest.warns(RenamedWarning, match=r"Older\.forward: the argument 'penalties' is now 'aux_losses'"):
        ls.mixers.register("older", Older)
    try:
        losses: list[Tensor] = []
        ls.mixers.build("older", **SIZES)(torch.randn(1, 5, 16), aux_losses=losses)
        assert len(losses) == 1
    finally:
        registered: Any = importlib.import_module("longspan.contract.registry")
        del registered.REGISTERED["older"]


def test_saved_files_do_not_warn() -> None:
    with renames.reading_saved():
        mixer = ls.mixers.build("infini", **SIZES, normaliser="gamma")
    config: Any = mixer.core.config
    assert config.normalizer == "gamma"


def test_the_migration_notes_name_every_old_and_new_name() -> None:
    notes = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
    pairs = [(f"{module}.{old}", f"{module}.{new}") for module, names in NAMES.items() for old, new in names.items()]
    pairs += [
        pair
        for names in (*KEYWORDS.values(), *FIELDS.values(), *renames.ATTRIBUTES.values(), renames.MIXERS)
        for pair in names.items()
    ]
    for old, new in pairs:
        assert f"`{old}`" in notes
        assert f"`{new}`" in notes
    for values in renames.VALUES.values():
        assert all(f'"{name}"' in notes for pair in values.items() for name in pair)
