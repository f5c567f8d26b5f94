"""The library's own models: decoders, encoders, masked LMs and recurrent memories of any mixers."""

from typing import TYPE_CHECKING

from longspan.models.classifier import RecurrentClassifier
from longspan.models.config import DecoderConfig, EncoderConfig, RecurrentConfig, StackConfig
from longspan.models.decoder import Decoder
from longspan.models.encoder import Encoder
from longspan.models.head import AdaptiveHead, Head
from longspan.models.io import accepted_hashes, load_model, load_weights, model_hash, save_model
from longspan.models.masked import MaskedLM
from longspan.models.recurrent import RecurrentMemory, RecurrentState
from longspan.models.stack import Stack, StackState
from longspan.models.tables import build_model, describe_model, resolve_model
from longspan.models.token_memory import Trace
from longspan.renames import accept_old_names

__all__ = [
    "AdaptiveHead",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Head",
    "MaskedLM",
    "RecurrentClassifier",
    "RecurrentConfig",
    "RecurrentMemory",
    "RecurrentState",
    "Stack",
    "StackConfig",
    "StackState",
    "Trace",
    "accepted_hashes",
    "build_model",
    "describe_model",
    "load_model",
    "load_weights",
    "model_hash",
    "resolve_model",
    "save_model",
]

if not TYPE_CHECKING:
    accept_old_names(globals())
