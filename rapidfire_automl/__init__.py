"""AutoML search for LLM fine-tuning: plain Optuna and TRL code, where every trial is an arm on one frozen base model.

Names are loaded at their first use (PEP 562), so that `import rapidfire_automl` is fast and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapidfire_automl.automl import AutoML
    from rapidfire_automl.configs import (
        RFDPOConfig,
        RFGRPOConfig,
        RFLoraConfig,
        RFModelConfig,
        RFRLOOConfig,
        RFSFTConfig,
    )
    from rapidfire_automl.events import Event
    from rapidfire_automl.executor import RapidFireExecutor
    from rapidfire_automl.experiment import Experiment, RFGridSearch, RFOptuna, RFRandomSearch
    from rapidfire_automl.notebook import panel as panel
    from rapidfire_automl.plan import Plan
    from rapidfire_automl.pruners import PolicyPruner
    from rapidfire_automl.reasoning import reasoning_rows
    from rapidfire_automl.replay import replay as replay
    from rapidfire_automl.samplers import ChunkSampler
    from rapidfire_automl.sampling import Sampling
    from rapidfire_automl.search import SearchResult, run_search
    from rapidfire_automl.space import List, Range
    from rapidfire_automl.steering import Search, in_background
    from rapidfire_automl.storages import open_storage
    from rapidfire_automl.stories import why

__version__ = "0.1.0.dev0"

_MODULES = {
    "AutoML": "automl",
    "ChunkSampler": "samplers",
    "Event": "events",
    "Experiment": "experiment",
    "List": "space",
    "Plan": "plan",
    "PolicyPruner": "pruners",
    "RFDPOConfig": "configs",
    "RFGRPOConfig": "configs",
    "RFGridSearch": "experiment",
    "RFLoraConfig": "configs",
    "RFModelConfig": "configs",
    "RFOptuna": "experiment",
    "RFRLOOConfig": "configs",
    "RFRandomSearch": "experiment",
    "RFSFTConfig": "configs",
    "Range": "space",
    "RapidFireExecutor": "executor",
    "Sampling": "sampling",
    "Search": "steering",
    "SearchResult": "search",
    "in_background": "steering",
    "open_storage": "storages",
    "panel": "notebook",
    "reasoning_rows": "reasoning",
    "replay": "replay",
    "run_search": "search",
    "why": "stories",
}

__all__ = [
    "AutoML",
    "ChunkSampler",
    "Event",
    "Experiment",
    "List",
    "Plan",
    "PolicyPruner",
    "RFDPOConfig",
    "RFGRPOConfig",
    "RFGridSearch",
    "RFLoraConfig",
    "RFModelConfig",
    "RFOptuna",
    "RFRLOOConfig",
    "RFRandomSearch",
    "RFSFTConfig",
    "Range",
    "RapidFireExecutor",
    "Sampling",
    "Search",
    "SearchResult",
    "__version__",
    "in_background",
    "open_storage",
    "panel",
    "reasoning_rows",
    "replay",
    "run_search",
    "why",
]


def __getattr__(name: str) -> Any:
    """Load an exported name from its module and keep it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the exported names, loaded or not."""
    return sorted({*globals(), *_MODULES})
