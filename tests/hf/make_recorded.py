"""Records the outputs of transformers' own Transformer-XL, for `test_import_transfo_xl.py`: `make recorded-logits`.

Runs in a venv of its own: the last transformers whose Transformer-XL is no deprecated one is 4.35, which needs numpy 1.
Every file holds a tiny model with random weights: the configuration, the weights under their names, tokens, and the
log-probabilities of segments in a row with the memory carried, from no memory ("empty") and from the zeros with which
transformers begins ("zeros").
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import TransfoXLConfig, TransfoXLLMHeadModel  # type: ignore[attr-defined]

FOLDER = Path(__file__).parent / "recorded"
SIZES = {"vocab_size": 23, "d_model": 8, "d_embed": 8, "n_head": 2, "d_head": 3, "d_inner": 10, "n_layer": 2}
SEGMENT, SEGMENTS, ROWS = 4, 4, 2
SETTINGS = {
    "plain": {"cutoffs": [], "div_val": 1, "mem_len": 4, "clamp_len": -1, "same_length": False, "untie_r": False},
    "alike": {"cutoffs": [5, 12], "div_val": 1, "mem_len": 6, "clamp_len": 3, "same_length": True, "untie_r": True},
    "narrower": {"cutoffs": [5, 12], "div_val": 2, "mem_len": 6, "clamp_len": 7, "same_length": False, "untie_r": True},
    "own_maps": {
        "cutoffs": [5, 12],
        "div_val": 2,
        "d_embed": 12,
        "mem_len": 3,
        "clamp_len": 0,
        "same_length": True,
        "untie_r": False,
        "pre_lnorm": True,
        "proj_share_all_but_first": False,
    },
    "factorized": {"cutoffs": [9], "div_val": 1, "d_embed": 5, "mem_len": 5, "clamp_len": 4, "same_length": False},
    "one_cluster": {"cutoffs": [], "div_val": 2, "mem_len": 2, "clamp_len": 0, "same_length": False, "pre_lnorm": True},
    "untied": {"cutoffs": [4], "div_val": 4, "mem_len": 4, "clamp_len": 5, "tie_word_embeddings": False},
    "no_memory": {"cutoffs": [5, 12], "div_val": 1, "mem_len": 0, "clamp_len": 0, "same_length": False},
}


def record(name: str, setting: dict[str, Any]) -> int:
    """Writes one file; returns its bytes."""
    torch.manual_seed(sorted(SETTINGS).index(name))
    config = TransfoXLConfig(**{**SIZES, **setting}, dropout=0.0, trainer_compatible=True)
    model = TransfoXLLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # initial weights are so small that every mechanism would give nearly the same
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens = torch.randint(0, config.vocab_size, (ROWS, SEGMENT * SEGMENTS))
    tensors = {f"weights.{key}": value.clone().contiguous() for key, value in model.state_dict().items()}
    starts = {"empty": [torch.zeros(0, ROWS, config.d_model)] * config.n_layer, "zeros": None}
    for start, memory in starts.items():
        scores = []
        if not config.mem_len:
            memory = None
        for part in tokens.split(SEGMENT, 1):
            with torch.no_grad():
                out = model(part, mems=memory)
            memory = out.mems
            scores.append(out.prediction_scores)
        tensors[start] = torch.cat(scores, 1)
    # leave out the fields that every configuration of transformers has
    common = transformers.PretrainedConfig().to_dict().keys() - {"tie_word_embeddings", "model_type"}
    described = {key: value for key, value in config.to_dict().items() if key not in common}
    described |= {"model_type": config.model_type, "tie_word_embeddings": config.tie_word_embeddings}
    header = {
        "config": described,
        "segment": SEGMENT,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "transformers": transformers.__version__,
    }
    path = FOLDER / f"transfo_xl_{name}.safetensors"
    # one entry, as `longspan.files` writes it: the order of several entries is not fixed
    save_file({**tensors, "tokens": tokens.to(torch.int32)}, path, {"longspan": json.dumps(header)})
    return path.stat().st_size


def main() -> None:
    """Write all files."""
    warnings.simplefilter("ignore")
    FOLDER.mkdir(exist_ok=True)
    sizes = {name: record(name, setting) for name, setting in SETTINGS.items()}
    total = sum(sizes.values())
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {sizes}, {total} bytes in all")
    if total > 200_000:
        sys.exit("more than 200 kB, which is too much for a repository")


if __name__ == "__main__":
    main()
