"""Errors a user can mend. The command line prints their message without a traceback."""


class TrainingError(Exception):
    """Base of all errors below."""


class ConfigError(TrainingError, ValueError):
    """A setting has the wrong value."""


class EnvError(TrainingError, ValueError):
    """An environment can't be made, can't be trained on, or misbehaves."""


class RunError(TrainingError, ValueError):
    """A run directory is missing, isn't one, or is in the way."""


class CheckpointError(TrainingError, RuntimeError):
    """A checkpoint can't be written, read or continued."""


class WriteError(TrainingError, RuntimeError):
    """A file can't be written."""
