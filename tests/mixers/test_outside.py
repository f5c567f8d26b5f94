"""A mechanism from outside of the package is used like longspan's own."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import outside

import longspan as ls
from longspan.cli.app import run
from longspan.contract import registry
from longspan.mixers import Mechanism, probe

SIZES: dict[str, Any] = {"dim": 16, "num_heads": 4, "num_kv_heads": 2}
HALF = [{"name": "leaky", "num_heads": 2}, {"name": "window", "num_heads": 2, "window": 4}]


@pytest.fixture(autouse=True)
def leaky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})
    ls.mixers.register("leaky", outside.LeakyMechanism)


def test_values_have_a_width_of_their_own() -> None:
    mixer = ls.mixers.build("leaky", **SIZES, value_dim=6).double()
    maps: Any = mixer.projections
    assert (maps.v_proj.out_features, maps.k_proj.out_features, maps.o_proj.in_features) == (12, 8, 24)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    assert mixer(x)[0].shape == x.shape
    # the map is that of the operation, whatever the width of the values
    k, v = (t.repeat_interleave(2, 1) for t in maps.keys_values(x))
    out = mixer.attention_map(x) @ v
    torch.testing.assert_close(maps.output(out), mixer(x)[0])
    assert k.shape[-1] == 4
    part_k, part_v = maps.keys_values(x, slice(1, 2))
    torch.testing.assert_close(part_k, k[:, 2:3])
    torch.testing.assert_close(part_v, v[:, 2:3])
    assert mixer.flops(9) == 2 * 9 * 16 * (16 + 8 + 12 + 24 + 2)


def test_parts_of_heads_share_one_width_of_values() -> None:
    mixer = ls.mixers.build("mixed_heads", **SIZES, mixers=HALF)
    assert mixer.traits.receives_hidden
    parts = [{**HALF[0], "value_dim": 6}, HALF[1]]
    with pytest.raises(ls.ConfigError, match=r"mixed_heads.mixers\[1\]: the width of values is 4, in mixers\[0\] 6;"):
        ls.mixers.build("mixed_heads", **SIZES, mixers=parts)
    whole = ls.mixers.build("mixed_heads", **SIZES, mixers=[{"name": "leaky", "num_heads": 2, "value_dim": 6}] * 2)
    assert whole.traits.value_dim == 6
    assert whole(torch.randn(1, 5, 16))[0].shape == (1, 5, 16)


@pytest.mark.parametrize("mixer", [{"name": "leaky", "value_dim": 6}, {"name": "mixed_heads", "mixers": HALF}], ids=str)
def test_it_trains_and_streams_in_a_model(mixer: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ls.Decoder(ls.DecoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=4, mixers=(mixer,)))
    tokens = torch.randint(11, (4, 24), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model = model.double().eval()
    with torch.no_grad():
        whole = model(tokens[:1])[0]
        session = ls.StreamSession(model)
        for first, last in ((0, 5), (5, 6), (6, 24)):
            logits = session.feed(tokens[:1, first:last])
            torch.testing.assert_close(logits.view(-1), whole[0, last - 1])


def test_what_it_reads_is_measured() -> None:
    """The gate, which reads hidden states too, scales earlier keys: that is not counted as reading a key."""
    mixer = ls.mixers.build("leaky", **SIZES, value_dim=6)
    reads = probe.influence(mixer, 20)
    assert int((reads > 0).sum()) == mixer.pairs(20)
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    assert (mixer.double().attention_map(x)[0] != 0).sum() == mixer.pairs(20)


def test_names_are_registered_once() -> None:
    ls.mixers.register("leaky", outside.LeakyMechanism)  # the same again changes nothing
    assert ls.mixers.names()[-1] == "leaky"
    assert ls.mixers.examples("leaky") == outside.LeakyMechanism.examples
    for name, core in (("full", outside.LeakyMechanism), ("leaky", registry.mechanism_class("full"))):
        with pytest.raises(ls.ConfigError, match=f"register: the mixer name '{name}' is already taken"):
            ls.mixers.register(name, core)
    classes: list[Any] = [outside.NotAMechanism, Mechanism]
    for refused in classes:
        with pytest.raises(
            ls.ConfigError, match=r"register 'new': .* is not a subclass of Mechanism with a dataclass Config"
        ):
            ls.mixers.register("new", refused)
    assert "new" not in ls.mixers.names()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Entry points of mechanisms: one that works, one with a name that longspan has, two that are broken."""
    values = {
        "forgetful": "tests.outside:LeakyMechanism",
        "full": "tests.outside:LeakyMechanism",
        "missing": "tests.outside:ThereIsNone",
        "odd": "tests.outside:NotAMechanism",
    }
    points = [EntryPoint(name, value, "longspan.mechanisms") for name, value in values.items()]
    groups: list[str] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        groups.append(group)
        return [point for point in points if point.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    registry.installed.cache_clear()
    yield groups
    registry.installed.cache_clear()


def test_installed_packages_bring_mechanisms(installed: list[str]) -> None:
    ls.mixers.build("window", **SIZES)
    assert not installed, "nobody looks for packages where longspan knows the name"
    assert ls.mixers.names()[-4:] == ["leaky", "forgetful", "missing", "odd"]
    mixer = ls.mixers.build("forgetful", **SIZES, value_dim=6)
    assert isinstance(mixer.core, outside.LeakyMechanism)
    assert not isinstance(ls.mixers.build("full", **SIZES).core, outside.LeakyMechanism)
    assert installed == ["longspan.mechanisms"]


def test_a_broken_package_is_one_line_and_breaks_no_other(
    installed: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, message in (
        ("missing", "mixer: mixer 'missing' of tests.outside:ThereIsNone failed to load: AttributeError: "),
        (
            "odd",
            "mixer: mixer 'odd' of tests.outside:NotAMechanism: .* is not a subclass of Mechanism with a dataclass",
        ),
    ):
        with pytest.raises(ls.ConfigError, match=message) as caught:
            ls.mixers.build(name, **SIZES)
        assert "\n" not in str(caught.value)
    with pytest.raises(ls.ConfigError, match="did you mean 'forgetful'"):
        ls.mixers.build("forgetfull", **SIZES)
    assert run(["mixers"]) == 0
    listed = capfd.readouterr().out
    assert "forgetful" in listed
    assert "failed to load" in " ".join(listed.split())
    assert run(["mixers", "forgetful"]) == 0
    assert "linear attention that forgets by a gate" in capfd.readouterr().out
    monkeypatch.setattr(registry, "names", lambda: ["full", "forgetful", "missing", "odd"])
    assert run(["show", "patterns", "--length", "5", "-o", str(tmp_path / "all")]) == 0
    drawn = capfd.readouterr()
    assert "skipped: mixer: mixer 'missing'" in drawn.err
    assert "forgetful" in drawn.out
    assert run(["show", "patterns", "missing", "-o", str(tmp_path / "one")]) == 2
    assert "failed to load" in capfd.readouterr().err
