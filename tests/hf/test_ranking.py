"""Layers ranked by what their conversion costs: the figures are those of whole models with one converted layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.hf.conftest import ids, make
from tests.hf.models import HYBRIDS, KINDS, make_family
from torch import Tensor

from longspan import hf
from longspan.errors import ConfigError, DataError

WINDOW: dict[str, Any] = {"window": 3, "sinks": 0}


def build(kind: str) -> Any:
    """A model of several layers."""
    if kind in KINDS:
        return make_family(kind)
    return make(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 3})


def converted_alone(model: Any, layer: int, text: Tensor, mask: Tensor) -> tuple[float, float]:
    """Divergence and increase of the loss in nats per token, from the logits of a model with one converted layer."""
    graded = (mask[:, :-1] & mask[:, 1:]).bool()
    nats, scores = [], []
    for convert in (False, True):
        if convert:
            hf.convert(model, "window", layers=[layer], **WINDOW)
        scores.append(model(text, attention_mask=mask, use_cache=False).logits[:, :-1][graded].log_softmax(-1))
        nats.append(F.nll_loss(scores[-1], text[:, 1:][graded]))
    hf.revert(model)
    divergence = F.kl_div(scores[1], scores[0], reduction="batchmean", log_target=True)
    return float(divergence), float(nats[1] - nats[0])


# GPT-2 is called with some of its layers converted, as its head passes position_ids=None
@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", *(kind for kind in ("gemma2", "granite") if kind in KINDS), *HYBRIDS[:1]]
)
@torch.no_grad()
def test_costs_are_those_of_models_with_one_converted_layer(kind: str) -> None:
    model, text, mask = build(kind), ids(2, 14), torch.ones(2, 14, dtype=torch.int64)
    mask[0, -4:] = 0
    layers = list(hf.convert(model, "window", **WINDOW).layers)
    with hf.Transfer(model, None, layers) as transfer:
        ranking = hf.rank_layers(transfer, [{"input_ids": text, "attention_mask": mask}])
    hf.revert(model)
    assert ranking.tokens == 22
    assert [cost.layer for cost in ranking.costs] == sorted(
        layers, key=lambda layer: -converted_alone(model, layer, text, mask)[0]
    )
    for cost in ranking.costs:
        expected = converted_alone(model, cost.layer, text, mask)
        assert (cost.divergence, cost.loss_increase) == pytest.approx(expected, abs=1e-5)
    assert hf.LayerRanking.of(ranking.to_dict()) == ranking


@pytest.mark.parametrize(("kind", "exact"), [("llama", "full"), ("mistral", "window")])
@torch.no_grad()
def test_a_conversion_keeps_softmax_where_it_costs_most(kind: str, exact: str) -> None:
    model, text = build(kind), ids(2, 14)
    report = hf.convert(model, "infini", layers="auto:2", data=[text], segment=4)
    assert report.ranking is not None
    costs = {cost.layer: cost.divergence for cost in report.ranking.costs}
    (converted,) = report.layers
    assert costs[converted] == min(costs.values())
    assert sorted((*report.layers, *report.softmax_layers)) == [0, 1, 2]
    names = {index: type(core).__name__.lower() for index, core in hf.mechanisms(model).items()}
    assert all((exact in name) == (index in report.softmax_layers) for index, name in names.items())
    assert len(report.new_parameters) == 1
    assert "2 layers keep softmax" in str(report)
    assert report.bounded == (exact == "window")
    # it streams in all layers, and predicts as a model in which only the other layer was converted
    streamed, _ = hf.ConvertedDecoder(model)(text)
    other = build(kind)
    hf.convert(other, "infini", layers=[converted], segment=4)
    torch.testing.assert_close(streamed, other(text, use_cache=False).logits, atol=1e-5, rtol=0)


def test_a_transfer_teaches_the_other_layers() -> None:
    model, text = build("llama").float(), [ids(2, 14, seed) for seed in range(6)]
    hf.convert(model, "infini", segment=4)
    report = hf.transfer(model, text, steps=2, layers="auto:1", keep_softmax=1)
    assert report.costs is not None
    (first,) = report.costs.costliest(1)
    assert set(report.after) == {0, 1, 2} - {first}
    assert set(report.softmax_layers) == {first, report.ranking[0]}
    assert report.to_dict()["costs"]["costs"][0]["layer"] == first
    assert [type(core).__name__ for core in hf.mechanisms(model).values()].count("FullMechanism") == 2


@pytest.mark.parametrize(
    ("layers", "data", "error", "message"),
    [
        ("auto:1", None, ConfigError, r"'auto:1' ranks the layers on a text; pass data="),
        ("auto:3", [ids(1, 14)], ConfigError, "must be from auto:1 to auto:2"),
        ("auto:0", [ids(1, 14)], ConfigError, "expected indices, or auto:N"),
        ("all", [ids(1, 14)], ConfigError, "expected indices, or auto:N"),
        ("auto:1", [], DataError, "no text to rank"),
        ("auto:1", [ids(1, 3)], DataError, "use pieces longer than its segment or window"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(layers: str, data: Any, error: type[Exception], message: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=message) as raised:
        hf.convert(model, "infini", layers=layers, data=data, segment=4)
    assert "\n" not in str(raised.value)
    assert not hf.mechanisms(model)
