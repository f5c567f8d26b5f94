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

# fields added after the first saved states, with the values that reproduce the earlier behavior
_ADDED_FIELDS: dict[str, Any] = {
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
# the same, of mechanisms
_ADDED_MIXER_FIELDS: dict[str, Any] = {"span_lr": None, "sinks": 0, "sink_positions": "absolute"}
_EARLIER_HASH = "_longspan_earlier_hash"


def save_model(model: torch.nn.Module, folder: str | Path) -> Path:
    """Write a model's configuration and weights, each file atomically.

    Raises:
        CheckpointError: not writable; earlier files are unchanged.
        UnsupportedError: a recurrent memory over a foreign backbone.
    """
    folder = Path(folder)
    described = describe_model(model)
    header = {"kind": "model", "config": data_digest(described)}
    write_tensors(folder / "model.safetensors", model.state_dict(), header)
    write_json(folder / "config.json", described)
    # written by earlier versions
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
        raise CheckpointError(
            f"{folder / 'config.json'}: is not the configuration of a model: {error}; restore the file"
        ) from None
    weights, header = read_tensors(folder / "model.safetensors")
    load_weights(model, weights, folder / "model.safetensors")
    # earlier versions did not write this digest
    if header.get("config", written) != written:
        raise CheckpointError(
            f"{folder / 'config.json'}: damaged, or changed after the weights were saved; restore the file"
        )
    return model.eval()


def is_converted(folder: str | Path) -> bool:
    """Whether a folder contains a pretrained model that `longspan.hf` converted; load it with `longspan.hf.load`."""
    path = Path(folder) / "config.json"
    return path.is_file() and bool(read_object(path).get("longspan"))


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: str | Path) -> None:
    """Load weights into a model, in place; names must match exactly.

    Raises:
        CheckpointError: names or shapes differ; names the first one.
    """
    expected = model.state_dict()
    unused = {name: weights[name] for name in _unused(model) if name in weights}
    weights = {name: value for name, value in weights.items() if name not in unused}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            problem = "missing" if name not in weights else "unexpected"
            raise CheckpointError(f"{where}: {problem} weight {name!r}; weights and configuration must be of one model")
        if weights[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)} by "
                "the configuration; weights and configuration must be of one model"
            )
    # the dtype is that of parameters alone, because statistics in buffers stay in fp32
    # the weights of a tuned model are only the trained ones, without those of its source
    named = [name for name, parameter in model.named_parameters() if parameter.is_floating_point() and name in weights]
    dtypes = {weights[name].dtype for name in named}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(weights)
    if unused:
        setattr(model, _EARLIER_HASH, (model_hash(model), _digest(model, unused)))


def _unused(model: torch.nn.Module) -> set[str]:
    """Return the names of weights that earlier versions saved although they were unused."""
    modules = [(name, module) for name, module in model.named_modules() if hasattr(module, "unused_weights")]
    return {f"{name}.{weight}".lstrip(".") for name, module in modules for weight in module.unused_weights()}


def model_hash(model: torch.nn.Module) -> str:
    """Return a digest of configuration and weights, which identifies the model that a saved state belongs to.

    Fields that change how the model computes but not its results (checkpointing, dropout) are left out; so are fields
    that earlier versions did not have, if they have the value of the earlier behavior.
    """
    return _digest(model, {})


def accepted_hashes(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the digests under which saved states may identify this model.

    They are its own digest and, as long as its weights are those of a loaded file with unused weights, the digest of
    earlier versions, which included these.
    """
    own = model_hash(model)
    loaded, earlier = getattr(model, _EARLIER_HASH, ("", ""))
    return (own, earlier) if loaded == own else (own,)


def _digest(model: torch.nn.Module, unused: dict[str, torch.Tensor]) -> str:
    """Return the digest of a model's configuration and weights, and of unused weights of its file."""
    described = {k: v for k, v in describe_model(model).items() if k not in ("checkpoint", "dropout", "ffn_chunk")}
    described = {k: v for k, v in described.items() if k not in _ADDED_FIELDS or v != _ADDED_FIELDS[k]}
    recorded = _without_added(renames.recorded(described))
    digest = hashlib.sha256(json.dumps(recorded, sort_keys=True).encode())
    for name, tensor in sorted({**model.state_dict(), **unused}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _without_added(described: Any) -> Any:
    """Return plain data without the fields of mechanisms, at any depth, that were added with this value."""
    if isinstance(described, dict):
        added = {key for key, value in _ADDED_MIXER_FIELDS.items() if key in described and described[key] == value}
        return {key: _without_added(value) for key, value in described.items() if key not in added}
    return [_without_added(value) for value in described] if isinstance(described, list | tuple) else described
