"""What is said to the user unasked: lines on standard error, warnings at the user's own line."""

import contextlib
import sys
import warnings
from pathlib import Path
from types import FrameType

# A `with` of the user enters by way of contextlib.
_BETWEEN = (str(Path(__file__).parent), contextlib.__file__)


def say(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"superpipeline: {text}\n")


def warn(text: str) -> None:
    """A RuntimeWarning that names the line that called into the package, however deep this is."""
    warnings.warn(f"superpipeline: {text}", RuntimeWarning, stacklevel=_level_of_user())


def _level_of_user() -> int:
    """For `warnings.warn` in the function that asks. Libraries may be between our own frames."""
    users, level = 1, 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        level += 1
        if frame.f_code.co_filename.startswith(_BETWEEN):
            users = level + 1
        frame = frame.f_back
    return users
