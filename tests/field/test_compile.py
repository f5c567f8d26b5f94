"""torch.compile: mechanisms and what the host lays out stay as they are, the rest of a model is compiled."""

from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, NAMES, converted, own, tokens

LONG = pytest.mark.long
ALWAYS = ("window",)  # compiling takes seconds a mechanism


def names(known: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in ALWAYS else LONG) for name in known]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(model: torch.nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_decoder_trains_and_streams_as_before(name: str) -> None:
    model = own(name)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    text, call = tokens(2, 9), compiled(model)
    expected = model(text, mask=mask)[0]
    expected.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    logits = call(text, mask=mask)[0]
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    with torch.no_grad():
        whole, (parts, state) = model(text)[0], call(text[:, :8])
        last, _ = call(text[:, 8:], state)
        torch.testing.assert_close(torch.cat([parts, last], 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", names(CONVERTIBLE))
def test_a_compiled_converted_model_computes_as_before(name: str) -> None:
    model = converted(name, layers=2)
    text = tokens(2, 9)
    torch.testing.assert_close(compiled(model)(text).logits, model(text).logits)


@pytest.mark.filterwarnings("ignore")
def test_the_projections_of_a_model_are_compiled() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    model = own("window", layers=2)
    torch.compile(model, backend=backend)(tokens(2, 9))
    assert sum("linear" in graph for graph in graphs) >= 2, graphs


@pytest.mark.filterwarnings("ignore")
def test_an_operation_of_its_own_can_be_inside_a_compiled_function() -> None:
    import longspan as ls

    def function(x: torch.Tensor) -> torch.Tensor:
        return ls.ops.window_attention(x, x * 2, x, window=4).sum()

    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    function(x).backward()
    expected, x.grad = x.grad, None
    torch.compile(function, backend="eager")(x).backward()
    torch.testing.assert_close(x.grad, expected)
