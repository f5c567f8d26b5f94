"""Label smoothing in transformers' Trainer: every causal model is scored on the next token, never on its own input."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.field.models import CONVERTIBLE, NAMES, converted, own, tokens
from torch import Tensor

import longspan as ls
from longspan.errors import UnsupportedError

transformers = pytest.importorskip("transformers")
from longspan import hf  # noqa: E402
from longspan.hf import modeling  # noqa: E402

SMOOTHING = 0.1


def trainer_loss(model: Any, batch: dict[str, Tensor], folder: Path) -> float:
    """The loss that the real Trainer computes with label smoothing, without a training step."""
    arguments = transformers.TrainingArguments(
        str(folder), label_smoothing_factor=SMOOTHING, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments)
    with torch.no_grad():
        return float(trainer.compute_loss(model.eval(), dict(batch)))


def smoothed(logits: Tensor, labels: Tensor) -> float:
    """Cross entropy with torch's own label smoothing, whose definition is the same."""
    return float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=SMOOTHING))


def next_token_loss(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    return smoothed(logits[:, :-1], batch["labels"][:, 1:])


def batch_of(rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def check(model: Any, tmp_path: Path) -> None:
    batch = batch_of()
    assert trainer_loss(model, batch, tmp_path) == pytest.approx(next_token_loss(model, batch), abs=2e-5)


def strong(model: Any) -> Any:
    """Weights large enough that copying the input and predicting the next token differ widely."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_own_models_are_scored_on_the_next_token(name: str, tmp_path: Path) -> None:
    check(strong(hf.LongspanForCausalLM.wrap(own(name))), tmp_path)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_converted_models_are_scored_on_the_next_token(name: str, tmp_path: Path) -> None:
    check(strong(converted(name)), tmp_path)


def test_recurrent_memory_is_scored_on_the_next_token(tmp_path: Path) -> None:
    memory = ls.RecurrentMemory(own("full"), segment_length=4, num_memory_tokens=2).eval()
    check(hf.LongspanForCausalLM.wrap(memory), tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["own", "converted"])
def test_adapters_around_a_model_change_nothing(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = hf.LongspanForCausalLM.wrap(own("infini")) if kind == "own" else converted("infini")
    targets = ["q_proj", "v_proj"]
    tuned = peft.get_peft_model(strong(model), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    check(tuned, tmp_path)


def test_a_class_derived_from_ours_is_scored_on_the_next_token(tmp_path: Path) -> None:
    class Renamed(hf.LongspanForCausalLM):
        pass

    check(strong(Renamed.wrap(own("full"))), tmp_path)


def test_a_model_loaded_by_the_auto_class_is_scored_on_the_next_token(tmp_path: Path) -> None:
    strong(hf.LongspanForCausalLM.wrap(own("linear"))).save_pretrained(tmp_path / "model")
    check(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path)


def test_masked_models_and_classifiers_are_not_shifted(tmp_path: Path) -> None:
    encoder = ls.EncoderConfig(vocab_size=50, dim=16, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    masked = hf.LongspanForMaskedLM.wrap(ls.MaskedLM(encoder).eval())
    batch = batch_of()
    with torch.no_grad():
        expected = smoothed(masked(input_ids=batch["input_ids"]).logits, batch["labels"])
    assert trainer_loss(masked, batch, tmp_path) == pytest.approx(expected, abs=2e-5)
    classifier = hf.LongspanForSequenceClassification.wrap(ls.Encoder(encoder).eval(), num_labels=3)
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        expected = smoothed(classifier(input_ids=batch["input_ids"]).logits, labels)
    assert trainer_loss(classifier, {**batch, "labels": labels}, tmp_path) == pytest.approx(expected, abs=2e-5)


def test_the_count_of_predictions_is_that_of_the_shifted_labels(tmp_path: Path) -> None:
    """Where the Trainer divides by the predictions of a whole step, it counts them as it does for Llama."""

    class Renamed(hf.LongspanForCausalLM):
        pass

    batch, arguments = batch_of(), transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    counts = [
        int(transformers.Trainer(model, arguments)._get_num_items_in_batch([batch], torch.device("cpu")))
        for model in (
            converted("full"),
            hf.LongspanForCausalLM.wrap(own("full")),
            Renamed.wrap(own("full")),
        )
    ]
    assert counts == counts[:1] * 3


def test_auxiliary_losses_that_a_trainer_leaves_out_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(transformers.utils.logging.get_logger(modeling.__name__), "warning_once", said.append)
    ids = tokens(2, 9)
    model = hf.LongspanForCausalLM.wrap(own("adaptive_span")).train()
    model(ids, labels=ids, num_items_in_batch=16)
    model(ids)
    assert not said
    model(ids, num_items_in_batch=16)
    assert len(said) == 1
    assert "hf.TrainerLoss" in said[0]
    hf.TrainerLoss(model, label_smoothing=SMOOTHING)
    model(ids, num_items_in_batch=16)
    assert len(said) == 1


def gpt2() -> Any:
    """Of a class for which transformers names no loss."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    hf.convert(model, "full")
    return strong(model)


@pytest.mark.parametrize("count", [None, 16])
def test_the_loss_of_a_model_whose_class_names_none_is_shifted_too(count: int | None) -> None:
    model, batch = gpt2(), batch_of()
    outputs = model(batch["input_ids"])
    scored = (batch["labels"][:, 1:] != -100).sum()
    share = 1 if count is None else float(scored / count)
    loss = hf.TrainerLoss(model, label_smoothing=SMOOTHING)(outputs, batch["labels"], count)
    assert float(loss.detach()) == pytest.approx(share * next_token_loss(model, batch), abs=1e-4)


def test_a_class_without_a_loss_of_its_own_is_named() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**sizes, intermediate_size=32))
    hf.convert(model, "full")
    with pytest.raises(UnsupportedError, match="BertForMultipleChoice"):
        hf.TrainerLoss(model)


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_train_their_auxiliary_losses_too() -> None:
    model = hf.LongspanForCausalLM.wrap(own("adaptive_span")).train()
    compiled = torch.compile(model, backend="eager")
    batch = batch_of()
    outputs = model(batch["input_ids"])
    plain = hf.TrainerLoss(model)(outputs, batch["labels"])
    assert torch.equal(hf.TrainerLoss(compiled)(outputs, batch["labels"]), plain)
    model.model.layers[0].mixer.core.span.data.fill_(7.0)
    step: Any = type("Step", (), {"global_step": 1})
    hf.AfterStep().on_step_end(None, step, None, model=compiled)
    assert float(model.model.layers[0].mixer.core.span.detach().max()) == 1
