"""Errors that a user can mend: one sentence each, and an exit state after sysexits.h."""

from __future__ import annotations


class UserError(Exception):
    """A mistake outside the program; its text has the value, the rule and the way out."""

    exit_status = 70


class ConfigError(UserError):
    """A key, type, value or combination that the configuration does not allow (EX_CONFIG)."""

    exit_status = 78


class DataError(UserError):
    """Data or a checkpoint that is there and can't be used (EX_DATAERR)."""

    exit_status = 65


class MissingError(UserError):
    """A data set, checkpoint or file that was asked for and is not there (EX_NOINPUT)."""

    exit_status = 66


class OutputError(UserError):
    """A file or folder that can't be written (EX_IOERR)."""

    exit_status = 74
