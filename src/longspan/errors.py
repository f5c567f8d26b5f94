"""What longspan raises: one line that says what is wrong, where, and what to do about it."""


class LongspanError(Exception):
    """Base of every error that a user of longspan can cause or meet; the command line prints it and exits with 2."""


class ConfigError(LongspanError, ValueError):
    """A configuration that names something unknown, has a value of the wrong type, or contradicts itself."""


class UnsupportedError(LongspanError, NotImplementedError):
    """Something this mechanism cannot do, with the reason."""


class CheckpointError(LongspanError):
    """A saved model, run or state that is missing, damaged, or belongs to something else."""


class DataError(LongspanError, ValueError):
    """Input data (files, token ids) that is missing, empty or does not fit the model."""
