"""The errors that end a program with one line and no traceback."""

import re

_LONGEST_WORD, _LONGEST_LINE = 300, 1500  # characters: a value of thousands says no more than these


def one_line(text: str) -> str:
    """The text on one line that a terminal shows: no line ends, no control characters, and no
    value at a length that nobody reads."""
    text = re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
    text = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda m: _shortened(m[0], 60, 20), text)
    if len(text) > _LONGEST_LINE:
        text = _shortened(text, 1000, 200)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str, first: int, last: int) -> str:
    return f"{text[:first]}...{text[-last:]} ({len(text)} characters)"


class UsageError(ValueError):
    """Bad input from the user: the message says what, where, and what to use instead.

    The command line prints it as one line and exits with 2; library callers see a `ValueError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class PlaceError(UsageError):
    """What one process of many was given is wrong: each says its own, one says what all find."""


class RunError(RuntimeError):
    """A run that cannot go on though the program is sound: what, where, and what may help.

    The command line prints it as one line and exits with code 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
