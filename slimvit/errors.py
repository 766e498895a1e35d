"""What can go wrong through input: one clear line, naming the thing, the rule and the value."""

from __future__ import annotations


class SlimvitError(ValueError):
    """Anything a user's input can cause; the message is one line. Commands end with status 1."""


class UsageError(SlimvitError):
    """The call itself is wrong (an unknown model, a number out of range): status 2 of a command."""


class SearchError(SlimvitError):
    """A search that would fail again: a budget out of reach, or numbers that are not finite."""


class MasksError(SlimvitError):
    """A masks file or a set of masks that breaks a rule (nesting, prefix tokens, shape, format)."""


class PlanError(SlimvitError):
    """A dynamic plan, or its file, that breaks a rule or does not fit the model."""


class UnsupportedModelError(SlimvitError):
    """A model that cannot be slimmed; the message says which part of it and why."""


class CheckpointError(SlimvitError):
    """Weights that do not fit the model, or a file that cannot be read as weights."""


class DataError(SlimvitError):
    """Images or a class map that cannot be used."""


class ExportError(SlimvitError):
    """A model that could not be exported, or a file that could not be written."""


class MismatchError(SlimvitError):
    """Two models that should answer alike do not."""
