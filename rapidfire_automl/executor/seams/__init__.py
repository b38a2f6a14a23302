"""Every touching point with TRL, PEFT, accelerate and transformers, in one place.

What is relied on, and what happens when it is not so (a line in `Seam.notes`, and the trial goes on):

- a causal LM's backbone is `model.base_model`, called by keyword with token ids -> else the trial runs unfused;
- TRL's fused LM head is a closure that tells its temperature and outputs -> else the trial's own head scores;
- `trainer.accelerator.backward` ends every backward -> checked at every step;
- transformers' `generate` takes a decoding method (`custom_generate`) -> rollouts of our own agree with the model's
  forward, which is checked before the first one, or else each trial decodes by itself;
- a trainer asks `set_initial_training_values` for its epochs and ends at `state.max_steps` -> else none is extended;
- `Trainer`'s loop loads through methods of its own (`_load_...`) and keeps its counters on the instance -> else a
  trainer can't be captured, and `why_not_durable` says so;
- plain LoRA layers hold `lora_A`, `lora_B`, `scaling`, `lora_dropout` by adapter name -> else unfused.
"""

from __future__ import annotations

from rapidfire_automl.executor.seams.adapters import (
    adapter_model,
    find_sites,
    guarded_injection,
    refuse,
    why_unfusable_args,
)
from rapidfire_automl.executor.seams.clones import (
    checkpointing_layers,
    decoder_of,
    device_of,
    keep_head_contiguous,
    share_clone,
    shared_head,
    why_unfusable_base,
)
from rapidfire_automl.executor.seams.durable import Durable, why_not_durable
from rapidfire_automl.executor.seams.rewards import (
    has_rollouts,
    sample_rewards,
    sampling_as,
    why_no_rewards,
    why_refused,
)
from rapidfire_automl.executor.seams.schedule import leave_room, lengthen, why_no_longer
from rapidfire_automl.executor.seams.selfcheck import Probe, check_rollouts, is_half, is_out_of_memory, self_check
from rapidfire_automl.executor.seams.trainer import Seam, autocast_dtype, fused_head_settings
from rapidfire_automl.executor.seams.weights import AdapterWeights, plain_config, put_optimizer

__all__ = [
    "AdapterWeights",
    "Durable",
    "Probe",
    "Seam",
    "adapter_model",
    "autocast_dtype",
    "check_rollouts",
    "checkpointing_layers",
    "decoder_of",
    "device_of",
    "find_sites",
    "fused_head_settings",
    "guarded_injection",
    "has_rollouts",
    "is_half",
    "is_out_of_memory",
    "keep_head_contiguous",
    "leave_room",
    "lengthen",
    "plain_config",
    "put_optimizer",
    "refuse",
    "sample_rewards",
    "sampling_as",
    "self_check",
    "share_clone",
    "shared_head",
    "why_no_longer",
    "why_no_rewards",
    "why_not_durable",
    "why_refused",
    "why_unfusable_args",
    "why_unfusable_base",
]
