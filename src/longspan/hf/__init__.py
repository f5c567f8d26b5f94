"""Hugging Face: pretrained models converted to any mechanism that works on q, k and v. Needs the extra `hf`."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    from longspan.errors import UnsupportedError

    raise UnsupportedError("longspan.hf needs transformers; pip install 'longspan[hf]'") from error

from longspan.hf.cache import StateCache, StateLayer
from longspan.hf.convert import Report, after_step, convert, cores, load, parameter_groups, penalties, revert

__all__ = [
    "Report",
    "StateCache",
    "StateLayer",
    "after_step",
    "convert",
    "cores",
    "load",
    "parameter_groups",
    "penalties",
    "revert",
]
