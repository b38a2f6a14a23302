"""Everything that touches torch."""

from rapidfire_automl.executor.executor import RapidFireExecutor

__all__ = ["RapidFireExecutor"]
