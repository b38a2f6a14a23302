"""Where what is made once per machine is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$RAPIDFIRE_AUTOML_CACHE`, or `rapidfire_automl` in `$XDG_CACHE_HOME` or `~/.cache`; not created."""
    own = os.environ.get("RAPIDFIRE_AUTOML_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rapidfire_automl"
