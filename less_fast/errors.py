"""The errors that less_fast raises for anything a user can get wrong."""

from __future__ import annotations


class LessFastError(ValueError):
    """A problem with the input, the files or the machine, in words for the person who reads it.

    The message is one line (or one line per problem) that names the thing, says what was expected and what was
    found, and what to do about it. The command line prints it without a traceback and exits with status 2.
    """


class UnsupportedBackendError(LessFastError):
    """An explicitly requested backend cannot run the call on this machine; the message carries its reason."""


class CorruptStoreError(LessFastError):
    """A file of a feature store is missing, truncated or altered."""
