"""Everything that touches torch."""

from .executor import RapidFireExecutor

__all__ = ["RapidFireExecutor"]
