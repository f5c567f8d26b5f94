"""Eight rows in one call or in four calls of two: the real Trainer computes the same losses and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, FIELDS, NAMES, VOCAB, converted, own, tokens
from torch import Tensor

import longspan as ls

transformers = pytest.importorskip("transformers")
from longspan import hf  # noqa: E402

# forms of mechanisms that have an auxiliary loss large enough to be seen beside the main one
WITH_AUX_LOSSES: dict[str, dict[str, Any]] = {
    "adaptive_span": {"penalty": 0.5},
    "compressive": {"loss": "attention", "loss_weight": 1e6},
    "routing": {"commitment": 1.0},
}
ROWS = 8
LONG = pytest.mark.long  # a run of the Trainer takes a second


class Recorder(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Keeps the gradients just before the optimizer reads them."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }


def one_step(model: Any, rows: list[dict[str, Tensor]], size: int, folder: Path, **options: Any) -> Any:
    """One optimizer step over all rows, `size` at a time: the loss that is logged, and the gradients."""
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(rows) // size,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    recorder = Recorder()
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=[recorder, hf.AfterStep()], **options
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], recorder.gradients


def check(make: Any, rows: list[dict[str, Tensor]], folder: Path, options: Any = None) -> None:
    """`make()` builds the same model twice; `options(model)` gives those of the Trainer."""
    runs = []
    for size in (8, 2):
        model = make()
        more = {} if options is None else options(model)
        runs.append(one_step(model, rows, size, folder, **more))
    (whole, gradients), (parts, part_gradients) = runs
    assert parts == pytest.approx(whole, rel=1e-4)
    assert gradients.keys() == part_gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert scale > 0
    for name, gradient in gradients.items():
        assert (part_gradients[name] - gradient).abs().max() <= 1e-4 * scale, name


def check_calls(model: Any, rows: list[dict[str, Tensor]]) -> None:
    """The contract itself, without a Trainer: calls that know the labels of their step add up to the step."""
    count = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    runs = []
    for size in (8, 2):
        model.zero_grad()
        total = 0.0
        for first in range(0, len(rows), size):
            batch = {key: torch.stack([row[key] for row in rows[first : first + size]]) for key in rows[0]}
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
        runs.append((total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (whole, gradients), (parts, part_gradients) = runs
    assert parts == pytest.approx(whole, rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (part_gradients[name] - gradient).abs().max() <= 1e-4 * scale, name


def language(ragged: bool = True) -> list[dict[str, Tensor]]:
    """Rows of one length; `ragged`: with different numbers of labels."""
    ids = tokens(ROWS, 9)
    labels = ids.clone()
    if ragged:
        for row in range(ROWS):
            labels[row, : row % 5] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def causal(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    mixers = ({"name": name, **FIELDS[name], **fields},)
    return hf.LongspanForCausalLM.wrap(own(name, mixers=mixers))


@pytest.mark.parametrize("name", NAMES)
def test_causal_models(name: str) -> None:
    check_calls(causal(name), language())


@pytest.mark.parametrize("kind", ["own", "converted"])
def test_the_real_trainer(kind: str, tmp_path: Path) -> None:
    check(lambda: causal("infini") if kind == "own" else converted("infini"), language(), tmp_path)


@pytest.mark.parametrize(
    "name", ["routing", *(pytest.param(name, marks=LONG) for name in ("adaptive_span", "compressive"))]
)
def test_causal_models_with_auxiliary_losses(name: str, tmp_path: Path) -> None:
    rows = language(ragged=name == "adaptive_span")  # a mean over data takes the share of its labels
    check(lambda: causal(name, **WITH_AUX_LOSSES[name]), rows, tmp_path)
    model = causal(name, **WITH_AUX_LOSSES[name]).train()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    out = model(**batch)
    plain = model.loss_function(logits=out.logits, labels=batch["labels"], vocab_size=VOCAB)
    torch.testing.assert_close(out.loss, plain + out.aux_loss)
    assert out.aux_loss.detach() > 1e-3


def test_a_penalty_of_recurrent_memory(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        memory = ls.RecurrentMemory(own("full"), segment_length=4, num_memory_tokens=2, gate_penalty=5.0)
        with torch.no_grad():
            for name, parameter in memory.cell.update.named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(1.0)
        return hf.LongspanForCausalLM.wrap(memory)

    check(make, language(ragged=False), tmp_path)


def masked(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    mixers = ({"name": name, **FIELDS.get(name, {}), **fields},)
    config = ls.EncoderConfig(vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, mixers=mixers)
    return ls.MaskedLM(config)


BIDIRECTIONAL = ["full", "window", "linear", "performer", "entmax", "bp", "lsh", "routing", "mixed_heads"]


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_masked_models(name: str) -> None:
    fields: dict[str, dict[str, Any]] = {
        "lsh": {"selection": "sorted"},
        "routing": {"selection": "balanced", "commitment": 0.0},
    }
    check_calls(hf.LongspanForMaskedLM.wrap(masked(name, **fields.get(name, {}))), language())


def test_masked_models_with_auxiliary_losses(tmp_path: Path) -> None:
    check(lambda: hf.LongspanForMaskedLM.wrap(masked("routing", commitment=1.0)), language(ragged=False), tmp_path)


LABELS = {
    "single_label_classification": torch.tensor([0, 1, 2, 2, 0, 1, 0, 2]),
    "multi_label_classification": (torch.arange(24).view(8, 3) % 5 < 2).float(),
    "regression": torch.arange(24).view(8, 3) / 7 - 1,
}


@pytest.mark.parametrize(
    "problem", [pytest.param(kind, marks=LONG if "label" not in kind or "multi" in kind else ()) for kind in LABELS]
)
def test_classifiers(problem: str, tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        mixers = ({"name": "adaptive_span", **FIELDS["adaptive_span"], "penalty": 0.5},)
        torch.manual_seed(1)
        return hf.LongspanForSequenceClassification.wrap(
            own("adaptive_span", mixers=mixers), num_labels=3, problem_type=problem
        )

    ids = tokens(ROWS, 9)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, LABELS[problem], strict=True)]
    check(make, rows, tmp_path)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_converted_models(name: str) -> None:
    check_calls(converted(name), language())


@pytest.mark.parametrize(("name", "smoothing"), [("adaptive_span", 0.0), ("routing", 0.1)])
def test_converted_models_with_auxiliary_losses(name: str, smoothing: float, tmp_path: Path) -> None:
    def make() -> Any:
        return converted_to(name, **WITH_AUX_LOSSES[name])

    def options(model: Any) -> dict[str, Any]:
        return {"compute_loss_func": hf.TrainerLoss(model, label_smoothing=smoothing)}

    rows = language(ragged=name == "adaptive_span")
    check(make, rows, tmp_path, options)
    model = make().train()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    out = model(input_ids=batch["input_ids"])
    loss = hf.TrainerLoss(model, label_smoothing=smoothing)(out, batch["labels"])
    plain = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=smoothing
    )
    extra = torch.stack(hf.aux_losses(model)).sum()
    assert extra.detach() > 1e-3
    torch.testing.assert_close(loss, plain + extra)


def converted_to(name: str, **fields: Any) -> Any:
    model = converted("full")
    hf.revert(model)
    hf.convert(model, name, **(FIELDS[name] | fields))
    return model


def test_label_smoothing_keeps_the_auxiliary_losses_of_own_models(tmp_path: Path) -> None:
    def make() -> Any:
        return causal("adaptive_span", penalty=0.5)

    def options(model: Any) -> dict[str, Any]:
        return {"compute_loss_func": hf.TrainerLoss(model, label_smoothing=0.1)}

    check(make, language(), tmp_path, options)
    model = make().train()
    batch = {key: torch.stack([row[key] for row in language()]) for key in language()[0]}
    out = model(input_ids=batch["input_ids"])
    plain = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(hf.TrainerLoss(model, label_smoothing=0.1)(out, batch["labels"]), plain + out.aux_loss)


@pytest.mark.parametrize("count", [40, torch.tensor(40), torch.tensor([40])])
def test_a_count_of_any_kind(count: Any) -> None:
    """Custom trainers give a number, replicas on several devices a row of one."""
    ids = tokens(2, 9)
    model = causal("adaptive_span", penalty=0.5).train()
    out = model(input_ids=ids, labels=ids, num_items_in_batch=count)
    whole = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss.squeeze(), whole.loss * 16 / 40)


def test_labels_that_are_shifted_already() -> None:
    ids = tokens(2, 9)
    model = causal("adaptive_span", penalty=0.5).train()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    out = model(input_ids=ids, labels=ids, shift_labels=shifted, num_items_in_batch=40)
    torch.testing.assert_close(out.loss, model(input_ids=ids, labels=ids).loss * 16 / 40)
