"""What models read: weights by distance and learned quantities against values that are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.comparison import HeldOut
from longspan.comparison import maps as maps_module
from longspan.comparison.maps import by_distance, look_at, map_section, measure_maps, quantities
from longspan.comparison.measure import made_of
from longspan.errors import UnsupportedError
from longspan.report import Picture, Table, Text
from longspan.train import run
from longspan.train.token_layers import LayerView, TokenDiagnostic


def test_weights_are_summed_by_distance() -> None:
    weights = np.zeros((8, 8))
    for query in range(8):
        weights[query, query] = 0.5
        weights[query, max(query - 3, 0)] += 0.25
    table = by_distance(weights)
    assert table["edges"] == [0, 1, 2, 4]
    assert table["weights"] == pytest.approx([0.5, 0, 0.25, 0])


def test_quantities_are_over_layers_heads_and_tokens() -> None:
    def view(number: int, values: Any, *, discrete: bool = False) -> LayerView:
        told = TokenDiagnostic(name="gate", caption="What it is.", values=np.array(values), discrete=discrete)
        return LayerView(number=number, name="x", diagnostics=[told])

    (gate,) = quantities([view(1, [0.25, 0.75]), view(2, [[0.5, np.nan]])])
    assert gate == {"name": "gate", "caption": "What it is.", "mean": 0.5, "low": 0.25, "high": 0.75}
    # names of clusters have no mean: the first head uses two of them, the second one
    (clusters,) = quantities([view(1, [[3.0, 7.0, 3.0], [2.0, np.nan, 2.0]], discrete=True)])
    assert clusters["name"] == "gate, different ones"
    assert (clusters["mean"], clusters["low"], clusters["high"]) == (1.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs of one step: a window of 4, learned spans, and a mechanism without weights."""
    folder = tmp_path_factory.mktemp("maps")
    (folder / "text.txt").write_text("the people of this union and congress, " * 60)
    tables: dict[str, Any] = {
        "window": {"name": "window", "window": 4},
        "infini": {"name": "infini", "segment": 16, "gate_init": -3.0},
        "compressive": {"name": "compressive"},
    }
    for name, mixer in tables.items():
        model = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "mixers": [mixer]}
        model |= {"positions": "none"} if name == "compressive" else {}
        task = {"name": "text", "source": str(folder / "text.txt")}
        run({"model": model, "task": task, "train": {"steps": 1}}, folder / name, progress="none")
    return {name: str(folder / name) for name in tables}


def test_a_window_reads_nothing_beyond_it(runs: dict[str, str], tmp_path: Path) -> None:
    measured = measure_maps(runs["window"], HeldOut(reach=100), tmp_path / "maps.json")
    distances = measured["distances"]
    edges, weights = distances["edges"], np.array(distances["weights"])
    # the mean over two layers, each of which reads 4 tokens
    assert weights[edges.index(4.0) :] == pytest.approx(0)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert np.array(measured["map"]).shape == (50, 50) or len(measured["map"]) <= 64
    assert measure_maps(runs["window"], HeldOut(reach=100), tmp_path / "maps.json") == measured


def test_the_section_shows_what_there_is(runs: dict[str, str], tmp_path: Path) -> None:
    maps = look_at(runs, HeldOut(reach=100), tmp_path)
    (gate,) = maps["infini"]["quantities"]
    assert gate["mean"] == pytest.approx(1 / (1 + np.exp(3)), abs=2e-3)
    assert (tmp_path / "measured" / "infini.maps.json").is_file()
    (section,) = map_section(maps)
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    assert [row[:2] for row in table.rows] == [("infini", "share of the memory")]
    assert len([block for block in section.blocks if isinstance(block, Picture)]) == 2
    nothing: dict[str, Any] = {"distances": None, "map": None, "quantities": [], "problem": ""}
    (silent,) = map_section({"silent": nothing})
    assert any(
        isinstance(block, Text) and block.text.endswith("no quantities to show: silent.") for block in silent.blocks
    )
    assert map_section({}) == []


def test_a_problem_loses_no_report(runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise UnsupportedError("reads whole texts only")

    monkeypatch.setattr(maps_module, "read_span", refuse)
    maps = look_at({"window": runs["window"]}, HeldOut(reach=100), tmp_path)
    assert maps["window"]["problem"] == "reads whole texts only"
    (section,) = map_section(maps)
    assert any(isinstance(block, Text) and block.text == "window: reads whole texts only" for block in section.blocks)
    # nothing is kept of it
    monkeypatch.undo()
    assert look_at({"window": runs["window"]}, HeldOut(reach=100), tmp_path)["window"]["problem"] == ""


def test_models_are_described_by_their_fields() -> None:
    heads = [{"name": "window", "window": 8, "num_heads": 2}, {"name": "routing"}]
    mixed = {"mixers": [{"name": "mixed_heads", "mixers": heads}]}
    assert made_of(mixed) == "mixed_heads(window(window=8, num_heads=2), routing)"
    recurrent = {"mixers": [{"name": "full"}, {"name": "full"}], "memory": {"segment_length": 128}}
    assert made_of(recurrent) == "full under recurrent memory(segment_length=128)"
