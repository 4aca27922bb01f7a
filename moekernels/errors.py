"""The errors that end a program with one line and no traceback."""


class UsageError(ValueError):
    """Bad input from the user: the message says what, where, and what would do.

    The command line prints it as one line and exits with code 2; library callers see a
    `ValueError`.
    """


class PlaceError(UsageError):
    """What one process of many was given is wrong: each says its own, where one says what all
    find."""


class RunError(RuntimeError):
    """A run that cannot go on though the program is sound: what, where, and what may do.

    The command line prints it as one line and exits with code 1.
    """
