"""Hugging Face: longspan's models as transformers models, and conversion of pretrained models. Needs the extra `hf`.

`import longspan.hf` registers `LongspanConfig` and its models, and the folders of converted models, so that
`AutoModelForCausalLM.from_pretrained` finds them.
"""

from typing import TYPE_CHECKING

try:
    import transformers
except ImportError as error:
    from longspan.errors import UnsupportedError

    raise UnsupportedError("longspan.hf needs transformers; pip install 'longspan[hf]'") from error

from longspan.hf.cache import StateCache, StateLayer
from longspan.hf.config import LongspanConfig
from longspan.hf.convert import Report, after_step, aux_losses, convert, mechanisms, parameter_groups, revert
from longspan.hf.decoder import ConvertedDecoder
from longspan.hf.import_checkpoint import import_checkpoint
from longspan.hf.loading import load, register
from longspan.hf.modeling import LongspanForCausalLM, LongspanForMaskedLM, LongspanForSequenceClassification
from longspan.hf.ranking import LayerCost, LayerRanking, rank_layers
from longspan.hf.training import AfterStep, TrainerLoss
from longspan.hf.transfer import Transfer, TransferReport, transfer
from longspan.hf.transfer_layer import TransferConfig
from longspan.lazy import submodules_of
from longspan.renames import accept_old_names, old_names

if not TYPE_CHECKING:  # so that type checkers still report misspelled names
    accept_old_names(globals())
    __getattr__ = old_names(__name__, globals(), submodules_of(__name__))

__all__ = [
    "AfterStep",
    "ConvertedDecoder",
    "LayerCost",
    "LayerRanking",
    "LongspanConfig",
    "LongspanForCausalLM",
    "LongspanForMaskedLM",
    "LongspanForSequenceClassification",
    "Report",
    "StateCache",
    "StateLayer",
    "TrainerLoss",
    "Transfer",
    "TransferConfig",
    "TransferReport",
    "after_step",
    "aux_losses",
    "convert",
    "import_checkpoint",
    "load",
    "mechanisms",
    "parameter_groups",
    "rank_layers",
    "revert",
    "transfer",
]

transformers.AutoConfig.register("longspan", LongspanConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(LongspanConfig, LongspanForCausalLM, exist_ok=True)
transformers.AutoModelForMaskedLM.register(LongspanConfig, LongspanForMaskedLM, exist_ok=True)
transformers.AutoModelForSequenceClassification.register(
    LongspanConfig, LongspanForSequenceClassification, exist_ok=True
)
register()
