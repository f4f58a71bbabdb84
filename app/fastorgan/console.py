"""Lines for the terminal: one each, whatever a file is called, and none that ends a run because nobody reads it."""

import os
import sys
from typing import TextIO


def say(text: str, stream: TextIO | None = None) -> None:
    """Print one line.

    A closed pipe or a full disk behind the stream is no reason to lose the cases that are left: the line is dropped,
    and so are those to come.

    Args:
        text: the line; what is not printable in it is escaped.
        stream: standard output if None.
    """
    stream = stream or sys.stdout
    try:
        # In one piece, which `print` does not do: a signal or another thread may come before the line's end.
        stream.write(f"{printable(text)}\n")
        stream.flush()
    except OSError:
        # Python would try to write the rest when it ends, and fail again. Tests put streams without a number here.
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass


def warn(text: str) -> None:
    """Print one line to standard error, after the program's name."""
    say(f"fastorgan: {text}", sys.stderr)


def printable(text: str) -> str:
    """Escape what would break a line, steer a terminal, or is no text: `a\\nb` shows as `a\\\\nb`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
