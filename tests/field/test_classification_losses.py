"""Problem types and label shapes of classifiers, compared with the loss of transformers' own classifiers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.field.models import NAMES, own, tokens
from torch import Tensor

import longspan as ls
from longspan.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")
from transformers.loss.loss_utils import ForSequenceClassificationLoss  # noqa: E402

from longspan import hf  # noqa: E402

LABELS = 3


def classifier(name: str = "full", **options: Any) -> Any:
    """A classifier of a decoder, or of an encoder where `name` is "encoder"."""
    torch.manual_seed(0)
    if name == "encoder":
        model: Any = ls.Encoder(ls.EncoderConfig(vocab_size=50, dim=16, num_layers=1, num_heads=2)).eval()
    elif name == "memory":
        model = ls.RecurrentMemory(own("full"), segment_length=4, num_memory_tokens=2).eval()
    else:
        model = own(name)
    torch.manual_seed(1)
    return hf.LongspanForSequenceClassification.wrap(model, **({"num_labels": LABELS} | options))


def expected_loss(logits: Tensor, labels: Tensor, **fields: Any) -> Tensor:
    config = transformers.PretrainedConfig(**fields)
    return ForSequenceClassificationLoss(labels=labels, pooled_logits=logits, config=config)


CASES = [
    # name, fields of the configuration, labels; the loss is transformers' for exactly these
    ("single", {"num_labels": 3}, torch.tensor([2, 0, 1, 1])),
    ("single column", {"num_labels": 3}, torch.tensor([[2], [0], [1], [1]])),
    ("single ignored", {"num_labels": 3}, torch.tensor([2, -100, 1, 1])),
    ("single named", {"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([2, 0, 1, 1])),
    ("multi", {"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])),
    (
        "multi named",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]),
    ),
    ("regression", {"num_labels": 1}, torch.tensor([0.5, -2.0, 1.0, 3.0])),
    ("regression column", {"num_labels": 1}, torch.tensor([[0.5], [-2.0], [1.0], [3.0]])),
    (
        "regression of several",
        {"num_labels": 3, "problem_type": "regression"},
        torch.tensor([[1.5, 0, 1], [0, -3, 0], [0, 1, 0.2], [1, 1, 1]]),
    ),
    ("binary decisions of one label", {"num_labels": 1, "problem_type": "multi_label_classification"}, None),
]


@pytest.mark.parametrize(("name", "fields", "labels"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("kind", ["full", "encoder", "memory"])
def test_every_problem_type_and_label_shape(kind: str, name: str, fields: dict[str, Any], labels: Any) -> None:
    labels = torch.tensor([[1.0], [0], [1], [1]]) if labels is None else labels
    model = classifier(kind, **fields)
    out = model(input_ids=tokens(4, 6), labels=labels)
    expected = expected_loss(out.logits, labels, **fields)
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    gradient = torch.autograd.grad(expected, out.logits)[0] if out.logits.requires_grad else None
    assert gradient is not None
    torch.testing.assert_close(model.score.bias.grad, gradient.sum(0))
    assert model.config.problem_type == expected_problem(fields, labels)


def expected_problem(fields: dict[str, Any], labels: Tensor) -> str:
    config = transformers.PretrainedConfig(**fields)
    ForSequenceClassificationLoss(labels=labels, pooled_logits=torch.zeros(4, fields["num_labels"]), config=config)
    return str(config.problem_type)


@pytest.mark.parametrize("name", NAMES)
def test_several_labels_for_every_mechanism(name: str) -> None:
    model = classifier(name, problem_type="multi_label_classification").eval()
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    out = model(input_ids=tokens(2, 9), labels=labels)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, labels))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.float64])
def test_labels_of_any_type(dtype: torch.dtype) -> None:
    several = torch.tensor([[1, 0, 1], [0, 1, 0]])
    model = classifier(problem_type="multi_label_classification")
    out = model(input_ids=tokens(2, 6), labels=several.to(dtype))
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, several.float()))
    out.loss.backward()
    # not named: a row of 0 and 1 per label can only be several labels
    out = classifier()(input_ids=tokens(2, 6), labels=several.to(dtype))
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, several.float()))
    # grades are often whole numbers or, from numpy, doubles
    grades = torch.tensor([1, 0])
    out = classifier(num_labels=1)(input_ids=tokens(2, 6), labels=grades.to(dtype))
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits[:, 0], grades.float()))
    out.loss.backward()
    if dtype in (torch.int32, torch.uint8):
        out = classifier()(input_ids=tokens(2, 6), labels=grades.to(dtype))
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, grades))


def test_losses_of_bfloat16_models_are_made_in_float32() -> None:
    model = classifier(num_labels=1).to(torch.bfloat16)
    grades = torch.tensor([100.3, -7.1])
    out = model(input_ids=tokens(2, 6), labels=grades)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits[:, 0].float(), grades))
    out.loss.backward()


def test_labels_that_do_not_fit_raise_an_error() -> None:
    ids = tokens(2, 6)
    model = classifier()
    model.config.__dict__["problem_type"] = "ranking"  # some versions check what is set
    with pytest.raises(ConfigError, match="problem_type = 'ranking': must be regression"):
        model(input_ids=ids, labels=torch.tensor([0, 1]))
    with pytest.raises(
        DataError, match=r"labels have shape \(2, 2\), expected \(2, 3\) for multi_label_classification"
    ):
        classifier(problem_type="multi_label_classification")(input_ids=ids, labels=torch.zeros(2, 2))
    with pytest.raises(DataError, match="set problem_type = 'multi_label_classification'"):
        classifier(problem_type="single_label_classification")(
            input_ids=ids, labels=torch.zeros(2, 3, dtype=torch.int64)
        )
    with pytest.raises(DataError, match="label 3: must be from 0 to 2"):
        classifier()(input_ids=ids, labels=torch.tensor([0, 3]))


def test_names_of_labels_and_the_problem_type_are_saved(tmp_path: Path) -> None:
    names = {0: "good", 1: "bad", 2: "ugly", 3: "none"}
    model = classifier(id2label=names, problem_type="multi_label_classification", num_labels=4)
    assert model.score.out_features == model.config.num_labels == 4
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.id2label == names
    assert again.config.problem_type == "multi_label_classification"
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    ours, theirs = (classifier(input_ids=tokens(2, 6), labels=labels).loss for classifier in (model, again))
    torch.testing.assert_close(ours, theirs)
    wider = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=6, ignore_mismatched_sizes=True
    )
    assert wider(input_ids=tokens(2, 6)).logits.shape == (2, 6)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_masked_language_models_leave_out_ignored_labels(kind: str) -> None:
    """The siblings of the classifier's loss: transformers' own, -100 left out, in fp32."""
    torch.manual_seed(0)
    ids = tokens(2, 8)
    labels = ids.masked_fill(torch.rand(2, 8) < 0.5, -100)
    if kind == "encoder":
        model = hf.LongspanForMaskedLM.wrap(
            ls.MaskedLM(ls.EncoderConfig(vocab_size=50, dim=16, num_layers=1, num_heads=2))
        )
        scored, shift = labels, 0
    else:
        model, scored, shift = hf.LongspanForCausalLM.wrap(own()), labels[:, 1:], 1
    out = model.to(torch.bfloat16)(input_ids=ids, labels=labels)
    logits = out.logits[:, : out.logits.shape[1] - shift].float()
    torch.testing.assert_close(out.loss, F.cross_entropy(logits.flatten(0, 1), scored.flatten()))


def test_another_ignored_label() -> None:
    ids, labels = tokens(4, 6), torch.tensor([2, 0, 1, 1])
    out = classifier()(input_ids=ids, labels=labels, ignore_index=1)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels, ignore_index=1))
    part = classifier()(input_ids=ids, labels=labels, ignore_index=1, num_items_in_batch=8)
    torch.testing.assert_close(part.loss, out.loss * 2 / 8)


def test_labels_that_do_not_fit_decide_no_problem_type() -> None:
    model, text = classifier(num_labels=3), tokens(2, 7)
    with pytest.raises(DataError):
        model(text, labels=torch.tensor([0.5, 1.0]))
    labels = torch.tensor([0, 2])
    loss = model(text, labels=labels).loss
    assert torch.allclose(loss, F.cross_entropy(model(text).logits, labels))


def test_the_loss_for_the_trainer_knows_the_same_label_shapes() -> None:
    model, text = classifier(num_labels=3), tokens(2, 7)
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    outputs = model(text)
    expected = F.binary_cross_entropy_with_logits(outputs.logits, labels.float())
    assert torch.allclose(hf.TrainerLoss(model)(outputs, labels), expected)
    assert torch.allclose(hf.TrainerLoss(model)(outputs, labels, 12), expected / 2)
    with pytest.raises(DataError, match="label_smoothing"):
        hf.TrainerLoss(model, label_smoothing=0.1)(outputs, labels)
