"""The one error that a user of the command line can cause."""


class UsageError(ValueError):
    """Bad input from the user: the message says what, where, and what would do.

    The command line prints it as one line and exits with code 2; library callers see a
    `ValueError`.
    """
