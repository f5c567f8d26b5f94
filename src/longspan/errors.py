"""Exceptions of longspan; a message says in one line what is wrong, where, and what to do."""


class LongspanError(Exception):
    """Base of all errors that users can cause or meet; the command line prints the message and exits with status 2."""


class ConfigError(LongspanError, ValueError):
    """A configuration has an unknown name, a value of the wrong type, or contradictory fields."""


class UnsupportedError(LongspanError, NotImplementedError):
    """The mechanism or model does not support the operation; the message gives the reason."""


class CheckpointError(LongspanError):
    """A saved model, run or state is missing, damaged, or belongs to another model."""


class DataError(LongspanError, ValueError):
    """Input data (files, token ids) is missing, empty or does not fit the model."""
