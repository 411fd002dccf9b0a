"""The two ways in which data can fail; the command line maps each to its exit code."""


class DataError(Exception):
    """Bad content: the message names what was given, what is allowed and where (``file:line``)."""


class DataUnavailable(Exception):
    """The data exist somewhere else and cannot be reached; the message names the ways out."""
