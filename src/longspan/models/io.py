"""Models on disk: a folder with `config.json` and `model.safetensors`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from longspan import renames
from longspan.errors import CheckpointError, ConfigError
from longspan.files import data_digest, read_json, read_object, read_tensors, write_json, write_tensors
from longspan.models.tables import build_model, describe_model

# fields that came after the first saved states, as they were before
_LATER: dict[str, Any] = {
    "reversible": False,
    "streams": "mean",
    "final_norm": None,
    "mixer_bias": None,
    "output_bias": False,
    "adaptive_cutoffs": [],
    "adaptive_div": 4.0,
    "embedding_dim": None,
    "tie_projections": "all",
    "position_dims": [],
}
_EARLIER = "_longspan_earlier_hash"


def save_model(model: torch.nn.Module, folder: str | Path) -> Path:
    """Write a model's configuration and weights, each file atomically.

    Raises:
        CheckpointError: not writable; earlier files still stand.
        UnsupportedError: a recurrent memory over a foreign backbone.
    """
    folder = Path(folder)
    described = describe_model(model)
    header = {"kind": "model", "config": data_digest(described)}
    write_tensors(folder / "model.safetensors", model.state_dict(), header)
    write_json(folder / "config.json", described)
    # of what stood here before
    (folder / "digests.json").unlink(missing_ok=True)
    return folder


def load_model(folder: str | Path) -> Any:
    """Read a model that `save_model` wrote, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    described = read_json(folder / "config.json")
    written = data_digest(described)
    try:
        with renames.reading_saved():
            model = build_model(described, str(folder / "config.json"))
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not a model's configuration: {error}") from None
    weights, header = read_tensors(folder / "model.safetensors")
    load_weights(model, weights, folder / "model.safetensors")
    # earlier versions did not write it
    if header.get("config", written) != written:
        raise CheckpointError(f"{folder / 'config.json'}: damaged, or changed after the weights were saved with it")
    return model.eval()


def is_converted(folder: str | Path) -> bool:
    """Whether a folder holds a pretrained model that `longspan.hf` converted; `longspan.hf.load` reads it."""
    path = Path(folder) / "config.json"
    return path.is_file() and bool(read_object(path).get("longspan"))


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: str | Path) -> None:
    """Load weights, every one of them, in place.

    Raises:
        CheckpointError: names or shapes differ; says which first.
    """
    expected = model.state_dict()
    unused = {name: weights[name] for name in _unused(model) if name in weights}
    weights = {name: value for name, value in weights.items() if name not in unused}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            problem = "missing" if name not in weights else "unexpected"
            raise CheckpointError(f"{where}: {problem} weight {name!r}; the file belongs to another configuration")
        if weights[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(weights[name].shape)}, the configuration says {tuple(expected[name].shape)}"
            )
    # statistics in buffers stay wide in a narrow model
    # a tuned model's weights are those that learn, without those of its source
    named = [name for name, parameter in model.named_parameters() if parameter.is_floating_point() and name in weights]
    dtypes = {weights[name].dtype for name in named}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(weights)
    if unused:
        setattr(model, _EARLIER, (model_hash(model), _digest(model, unused)))


def _unused(model: torch.nn.Module) -> set[str]:
    """Names of weights that earlier versions saved though nothing used them."""
    modules = [(name, module) for name, module in model.named_modules() if hasattr(module, "unused_weights")]
    return {f"{name}.{weight}".lstrip(".") for name, module in modules for weight in module.unused_weights()}


def model_hash(model: torch.nn.Module) -> str:
    """A digest of configuration and weights: which model a saved state belongs to.

    Fields that change how the model computes but not what (checkpointing, dropout) are left out; so is a field that
    earlier versions did not have, where it says what they did.
    """
    return _digest(model, {})


def accepted_hashes(model: torch.nn.Module) -> tuple[str, ...]:
    """The digests by which saved states may name this model: its own, and while its weights are those of a file with
    weights that nothing uses any more, the one that earlier versions wrote, which counted them.
    """
    own = model_hash(model)
    loaded, earlier = getattr(model, _EARLIER, ("", ""))
    return (own, earlier) if loaded == own else (own,)


def _digest(model: torch.nn.Module, unused: dict[str, torch.Tensor]) -> str:
    described = {k: v for k, v in describe_model(model).items() if k not in ("checkpoint", "dropout", "ffn_chunk")}
    described = {k: v for k, v in described.items() if k not in _LATER or v != _LATER[k]}
    digest = hashlib.sha256(json.dumps(renames.recorded(described), sort_keys=True).encode())
    for name, tensor in sorted({**model.state_dict(), **unused}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
