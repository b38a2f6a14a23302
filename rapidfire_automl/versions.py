"""Which versions were tested together, and which are here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

TESTED: Mapping[str, str] = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
    "optuna": "5.0.0",
    "accelerate": "1.15.0",
}
"""As in `constraints.txt`; a test holds the two together."""


def installed() -> dict[str, str | None]:
    """Versions of Python, of this package and of what a search's result depends on; None where one is missing."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in ("rapidfire_automl", *TESTED):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
