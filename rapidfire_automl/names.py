"""Names that become folders' and studies': plain ones, so that no file ends up outside the folder it was meant for."""

from __future__ import annotations

import os
import re

LONGEST = 100
"""Characters; file systems take 255 bytes, and numbers are added to names."""
_PLAIN = re.compile(r"[\w-][\w .+-]*")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


def check_name(name: object, what: str) -> str:
    """A name as it is, if it is a plain one.

    Args:
        name: Of an experiment, a study or a run.
        what: The argument or key it came from.

    Raises:
        ValueError: It has a path in it, or what a file system or a database can't bear; the message has the fix.

    >>> check_name("lora sweep-2", "study")
    'lora sweep-2'
    >>> check_name("../../x", "study")
    Traceback (most recent call last):
    ValueError: `study` must be a plain name of letters, digits, `-`, `_`, `+`, `.` and spaces, no path, got '../../x'.
    """
    if isinstance(name, str) and len(name) > LONGEST:
        raise ValueError(
            f"`{what}` must have at most {LONGEST} characters, got {len(name)}: {name[:20]!r}... Shorten it."
        )
    if not isinstance(name, str) or not _PLAIN.fullmatch(name) or name != name.strip():
        raise ValueError(
            f"`{what}` must be a plain name of letters, digits, `-`, `_`, `+`, `.` and spaces, no path, got {name!r}."
        )
    return name


def check_folder(path: str | os.PathLike[str], what: str) -> str:
    """A folder's path as text, if there can be one; unlike a name it may lead anywhere.

    Raises:
        ValueError: It is empty, has unprintable characters, or a part that is too long.

    >>> check_folder("", "output.dir")
    Traceback (most recent call last):
    ValueError: `output.dir` must name a folder, got ''. Write "." for the current one.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(f'`{what}` must name a folder, got {text!r}. Write "." for the current one.')
    if _UNPRINTABLE.search(text):
        raise ValueError(f"`{what}` must be a folder's path without unprintable characters, got {text!r}.")
    longest = max(text.replace("\\", "/").split("/"), key=len)
    if len(os.fsencode(longest)) > 255 or len(text) > 4000:
        raise ValueError(f"`{what}` must be a shorter path, got {len(text)} characters: {longest[:20]!r}...")
    return text
