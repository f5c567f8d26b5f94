"""The whole life of transformers' Trainer with own and converted models: every step as a Llama goes through it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.field.models import CONVERTIBLE, NAMES, VOCAB, converted, labeled, llama, own, tokens
from torch import Tensor

import longspan as ls

transformers = pytest.importorskip("transformers")
from longspan import hf  # noqa: E402

SHORT = ["infini", "adaptive_span"]
ROWS, LENGTH = 6, 8


def rows(seed: int = 0) -> list[dict[str, Tensor]]:
    """Next-token rows of one length, a few labels left out."""
    ids = tokens(ROWS, LENGTH, seed)
    labels = ids.clone()
    # the first label is never predicted; older Trainers count it, of every model, unless it is left out
    labels[:, ::3] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def make(kind: str, name: str) -> Any:
    return hf.LongspanForCausalLM.wrap(own(name)) if kind == "own" else converted(name)


def reload(kind: str, folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder) if kind == "own" else hf.load(folder)


def trainer_of(model: Any, folder: Path, **more: Any) -> Any:
    callbacks, extra = more.pop("callbacks", []), more.pop("extra", {})
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = transformers.TrainingArguments(str(folder), **(settings | more))
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(1),
        callbacks=[hf.AfterStep(), *callbacks],
        **extra,
    )


def mean_loss(logits: Any, labels: Any) -> float:
    shifted = torch.as_tensor(labels)[:, 1:].flatten()
    return float(F.cross_entropy(torch.as_tensor(logits)[:, :-1].flatten(0, 1).float(), shifted))


def evaluate_and_predict(kind: str, name: str, tmp_path: Path) -> None:
    model = make(kind, name)
    trainer = trainer_of(model, tmp_path)
    held_out = {key: torch.stack([row[key] for row in rows(1)]) for key in rows(1)[0]}
    with torch.no_grad():
        logits = model.eval()(input_ids=held_out["input_ids"]).logits
    expected = mean_loss(logits, held_out["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)
    predicted = trainer.predict(rows(1))
    torch.testing.assert_close(torch.as_tensor(predicted.predictions), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.as_tensor(predicted.label_ids), held_out["labels"])
    assert predicted.metrics["test_loss"] == pytest.approx(expected, abs=1e-4)
    # rows without labels can be predicted too: there is no loss, and no state among the predictions
    bare = trainer.predict([{"input_ids": row["input_ids"]} for row in rows(1)])
    torch.testing.assert_close(torch.as_tensor(bare.predictions), logits, rtol=1e-4, atol=1e-4)
    assert bare.label_ids is None


@pytest.mark.parametrize("name", NAMES)
def test_own_models_are_evaluated(name: str, tmp_path: Path) -> None:
    evaluate_and_predict("own", name, tmp_path)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_converted_models_are_evaluated(name: str, tmp_path: Path) -> None:
    evaluate_and_predict("converted", name, tmp_path)


def test_metrics_are_computed_from_logits_alone(tmp_path: Path) -> None:
    """`compute_metrics` gets what it gets of a Llama: logits (rows, length, vocabulary) and labels."""
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"loss_again": mean_loss(prediction.predictions, prediction.label_ids)}

    for model in (make("own", "full"), make("converted", "full"), llama()):
        scores = trainer_of(model, tmp_path, extra={"compute_metrics": metrics}).evaluate()
        assert scores["eval_loss_again"] == pytest.approx(scores["eval_loss"], abs=1e-4)
    assert shapes == [((ROWS, LENGTH, VOCAB), (ROWS, LENGTH))] * 3


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """The weights of the model at every evaluation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(weights(model))


@pytest.mark.parametrize("kind", ["own", "converted"])
@pytest.mark.parametrize("name", SHORT)
def test_the_best_model_is_loaded_saved_and_read_again(kind: str, name: str, tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_of(
        make(kind, name),
        tmp_path / "run",
        learning_rate=0.3,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        callbacks=[watch],
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert same(weights(trainer.model), watch.seen[best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-5)
    trainer.save_model(str(tmp_path / "best"))
    again = reload(kind, tmp_path / "best")
    ids = tokens(2, 9, 3)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["own", "converted"])
@pytest.mark.parametrize("name", SHORT)
def test_a_resumed_run_ends_as_one_that_never_stopped(kind: str, name: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    whole = trainer_of(make(kind, name), tmp_path / "whole", **saving)
    whole.train()
    first = trainer_of(make(kind, name), tmp_path / "parts", **saving | {"max_steps": 2})
    first.train()
    second = trainer_of(make(kind, name), tmp_path / "parts", **saving)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    for key, tensor in weights(whole.model).items():
        torch.testing.assert_close(second.model.state_dict()[key], tensor, msg=labeled(key))


@pytest.mark.parametrize("kind", ["own", "converted"])
def test_training_stops_early(kind: str, tmp_path: Path) -> None:
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    trainer = trainer_of(
        make(kind, "infini"),
        tmp_path,
        max_steps=30,
        learning_rate=2.0,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        save_total_limit=2,
        metric_for_best_model="loss",
        callbacks=[stop],
    )
    trainer.train()
    assert trainer.state.global_step < 30


def test_masked_models_and_classifiers_are_evaluated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ls.EncoderConfig(vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2)
    masked = hf.LongspanForMaskedLM.wrap(ls.MaskedLM(config).eval())
    held_out = {key: torch.stack([row[key] for row in rows(1)]) for key in rows(1)[0]}
    trainer = trainer_of(masked, tmp_path)
    with torch.no_grad():
        logits = masked.eval()(input_ids=held_out["input_ids"]).logits
    expected = float(F.cross_entropy(logits.flatten(0, 1), held_out["labels"].flatten()))
    trainer.train()
    assert trainer.state.log_history[-2]["eval_loss"] < expected + 1
    classifier = hf.LongspanForSequenceClassification.wrap(ls.Encoder(config).eval(), num_labels=3)
    labels = torch.arange(ROWS) % 3
    data = [{"input_ids": row["input_ids"], "labels": label} for row, label in zip(rows(1), labels, strict=True)]
    with torch.no_grad():
        logits = classifier.eval()(input_ids=held_out["input_ids"]).logits
    trainer = trainer_of(classifier, tmp_path)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-4)
    torch.testing.assert_close(torch.as_tensor(trainer.predict(data).predictions), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["own", "converted"])
def test_recomputed_activations_change_nothing(kind: str, tmp_path: Path) -> None:
    """The Trainer's switch for activation checkpointing, by the name that the version has for it."""
    fields = transformers.TrainingArguments.__dataclass_fields__
    switch = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    trained = []
    for recompute in (False, True):
        trainer = trainer_of(make(kind, "infini"), tmp_path, eval_strategy="no", **{switch: recompute})
        trainer.train()
        trained.append(weights(trainer.model))
    for key, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][key], tensor)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["own", "converted"])
def test_adapters_are_trained_evaluated_and_resumed(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def tuned() -> Any:
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(make(kind, "infini"), settings)

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tuned(), tmp_path / "whole", **saving)
    whole.train()
    trainer_of(tuned(), tmp_path / "parts", **saving | {"max_steps": 2}).train()
    second = trainer_of(tuned(), tmp_path / "parts", **saving)
    second.train(resume_from_checkpoint=True)
    expected = whole.predict(rows(1))
    torch.testing.assert_close(
        torch.as_tensor(second.predict(rows(1)).predictions), torch.as_tensor(expected.predictions)
    )
    whole.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(make(kind, "infini"), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = again(input_ids=torch.stack([row["input_ids"] for row in rows(1)])).logits
    torch.testing.assert_close(logits, torch.as_tensor(expected.predictions), rtol=1e-4, atol=1e-4)
