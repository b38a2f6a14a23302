"""Why a search is not begun in a folder: somebody else searches there, or something else has not come to its end."""

from __future__ import annotations

import shlex
from pathlib import Path


class FolderInUse(RuntimeError):
    """A search is under way in this folder.

    Args:
        folder: The search's.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"A search is under way in {folder}. Wait for it, end it with `rapidfire-automl cancel --run "
            f"{shlex.quote(str(folder))}`, or take another folder (`-o` on the command line)."
        )


class SearchDiffers(ValueError):
    """A search can't go on as another one."""
