"""Errors that name a value and a remedy.

Every error derives from `IpissaError`, so one `except` at the edge (command line, HTTP) turns any of
them into one sentence, and from the standard exception that describes it, so library users need not
know ours.
"""


class IpissaError(Exception):
    """Base of everything ipissa raises on purpose."""


class AdapterFileError(IpissaError, ValueError):
    """The adapter file is truncated, of another format or kind, or holds unusable tensors."""


class BaseModelMismatchError(IpissaError, ValueError):
    """The adapter was made for another base model."""


class AlphaError(IpissaError, ValueError):
    """α is not a finite number, or does not fit the batch or the adapters."""


class ModelLoadError(IpissaError, OSError):
    """The base model cannot be found or read."""


class ConfigError(IpissaError, ValueError):
    """A setting has a value that cannot be used."""


class NotFiniteError(IpissaError, ArithmeticError):
    """A model's predictions are not finite, so nothing can be drawn from them."""


class TrainingError(IpissaError, RuntimeError):
    """Training cannot start or did not produce a usable adapter."""
