"""Every touching point with TRL, PEFT, accelerate and transformers, in one place.

What is relied on, and what happens when it is not so (a line in `Seam.notes`, and the trial goes on):

- a causal LM's backbone is `model.base_model`, called by keyword with token ids -> else the trial runs unfused;
- TRL's fused LM head is a closure that tells its temperature and outputs -> else the trial's own head scores;
- `trainer.accelerator.backward` ends every backward -> checked at every step;
- plain LoRA layers hold `lora_A`, `lora_B`, `scaling`, `lora_dropout` by adapter name -> else unfused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

from rapidfire_automl.executor.adapters import LoraSite
from rapidfire_automl.executor.head import Head
from rapidfire_automl.executor.requests import Backward, Forward, HeadSpec

Submit = Callable[[Any], Any]

_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_PLAIN_KEYWORDS = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict"}
_PACKED_KEYWORDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What TRL says of packed rows beside their position ids: hints for kernels that a Llama does without."""


def share_clone(model: PreTrainedModel) -> PreTrainedModel:
    """New module objects over the same tensors, so that a trial can inject and patch what it likes."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def decoder_of(model: nn.Module) -> nn.Module:
    """The backbone TRL calls for hidden states."""
    decoder = model.base_model
    assert isinstance(decoder, nn.Module)
    return decoder


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter lives."""
    return next(model.parameters()).device


def refuse(config: Any) -> None:
    """Raise ValueError for adapters that would change the shared base.

    Args:
        config: A PEFT config that is about to be injected into a trial's clone.
    """
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise ValueError(
            f"`init_lora_weights={init!r}` rewrites the base model's weights, which all trials share. "
            "Use True, 'gaussian', 'orthogonal' or 'eva'."
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ValueError("`kasa_config` rewrites the base model's weights, which all trials share. Leave it out.")
    for name in ("bias", "vera_bias"):
        bias = getattr(config, name, "none")
        if bias != "none":
            raise ValueError(f"`{name}={bias!r}` unfreezes biases of the base, which all trials share. Use 'none'.")


@contextmanager
def guarded_injection(is_ours: Callable[[nn.Module], bool]) -> Iterator[None]:
    """While open, adapters that would rewrite the base, and merging, are refused before PEFT touches a shared clone."""
    original = BaseTuner.inject_adapter

    def inject(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if is_ours(model):
            refuse(self.peft_config[adapter_name])
        return original(self, model, adapter_name, *args, **kwargs)

    def refused(name: str) -> Callable[..., Any]:
        own = getattr(BaseTuner, name)

        def merge(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
            if is_ours(self.model):
                raise RuntimeError(
                    f"`{name}` would write into the base, which all trials share. "
                    "Load the saved adapter into a model of your own and merge it there."
                )
            return own(self, *args, **kwargs)

        return merge

    names = ("merge_adapter", "merge_and_unload")
    originals = {name: getattr(BaseTuner, name) for name in names}
    BaseTuner.inject_adapter = inject
    for name in names:
        setattr(BaseTuner, name, refused(name))
    try:
        yield
    finally:
        BaseTuner.inject_adapter = original
        for name, own in originals.items():
            setattr(BaseTuner, name, own)


def why_unfusable_base(model: PreTrainedModel) -> str:
    """Why no trial on this base can train in joint passes, or an empty string."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return "a mixture-of-experts base: the joint pass would drop its router's gradient"
    if getattr(model, "is_loaded_in_8bit", False):
        return "LLM.int8 picks outlier columns over the whole batch"
    dropouts = {name: getattr(config, name) for name in dir(config) if name.endswith(("dropout", "pdrop"))}
    hot = {name: p for name, p in dropouts.items() if isinstance(p, float) and p > 0}
    if hot:
        return f"the base has dropout of its own ({', '.join(f'{k}={v}' for k, v in hot.items())})"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder base"
    if not isinstance(getattr(model, "base_model", None), nn.Module) or model.base_model is model:
        return "no backbone at `model.base_model`"
    return ""


def find_sites(model: PeftModel) -> tuple[dict[str, LoraSite], str]:
    """The trial's adapter by module path, and why it can't join, or an empty string."""
    if len(model.peft_config) != 1:
        return {}, "several adapters"
    name = model.active_adapter
    if not isinstance(name, str):
        return {}, "several active adapters"
    config = model.peft_config[name]
    if type(config) is not LoraConfig:
        return {}, f"{type(config).__name__} adapters"
    sites: dict[str, LoraSite] = {}
    known: set[int] = set()
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return {}, "`modules_to_save` or `trainable_token_indices`"
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            return {}, f"{type(module).__name__} adapters"
        if not isinstance(module, LoraLayer):
            continue
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None:
            return {}, f"the LoRA variant {type(variant).__name__}"
        if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
            return {}, f"LoRA on {type(module.get_base_layer()).__name__} ({path})"
        if module.lora_bias[name] or getattr(module, "fan_in_fan_out", False):
            return {}, "`lora_bias` or `fan_in_fan_out`"
        if not path.startswith(model.get_base_model().base_model_prefix + "."):
            return {}, f"LoRA outside the backbone ({path})"
        drop = module.lora_dropout[name]
        site = LoraSite(
            a=module.lora_A[name].weight,
            b=module.lora_B[name].weight,
            scaling=float(module.scaling[name]),
            dropout=drop.p if isinstance(drop, nn.Dropout) else 0.0,
            dropout_module=drop,
        )
        known |= {id(site.a), id(site.b)}
        sites[path] = site
    extra = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if extra:
        return {}, f"trainable parameters beside LoRA ({extra[0]})"
    return (sites, "") if sites else ({}, "no LoRA layer")


def why_unfusable_args(args: Any) -> str:
    """Why a trial's own arguments keep it out of joint passes, or an empty string."""
    for name in ("neftune_noise_alpha", "use_liger_kernel", "torch_compile", "activation_offloading"):
        if getattr(args, name, None):
            return f"`{name}`"
    if (getattr(args, "gradient_checkpointing_kwargs", None) or {}).get("use_reentrant"):
        return "reentrant gradient checkpointing"
    return ""


def shared_head(model: PreTrainedModel) -> Head | None:
    """The base's LM head, or None where the joint head can't stand in for it."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return Head(head.weight, head.bias)


def fused_head_settings(forward: Callable[..., Any]) -> HeadSpec | None:
    """Read temperature, scale and outputs from TRL's patched forward, or None if it isn't one we can stand in for."""
    function = getattr(forward, "__func__", None)
    if function is None or "fused_lm_head" not in function.__code__.co_varnames:
        return None
    known = inspect.getclosurevars(function).nonlocals
    try:
        if known["final_logit_softcapping"] is not None or known["cast_lm_head_to_fp32"]:
            return None
        return HeadSpec(
            outputs=frozenset(known["outputs"]) | {"log_probs"},
            inverse_temperature=1.0 / float(known["temperature"]),
            logit_scale=float(known["logit_scale"]),
        )
    except (KeyError, TypeError):
        return None


def autocast_dtype(device: str) -> torch.dtype | None:
    """The autocast dtype in force in this thread, or None."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _real_tokens(kwargs: dict[str, Any]) -> int:
    """The tokens of a backbone's forward, without padding."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.sum())
    return int(ids.numel() if ids is not None else kwargs["inputs_embeds"][..., 0].numel())


@dataclass(slots=True)
class Seam:
    """The cuts in one trial's trainer; `close` undoes them.

    Args:
        trainer: The trial's trainer.
        model: Its PEFT model.
        submit: Files a request and returns its answer, in the trial's thread.
        fused: Whether forwards are handed over; the backward and the pace are in any case.
        pace: Called before a training forward, with the real tokens in it if it is not handed over.
    """

    trainer: Trainer
    model: PeftModel
    submit: Submit
    pace: Callable[[int], None]
    fused: bool
    joint_head: bool
    notes: list[str] = field(default_factory=list)
    _checkpointed: Any = None
    _adapted: Any = None
    _off: int = 0
    _own_disable: Callable[[], Any] = nullcontext
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def open(self) -> None:
        """Put the cuts in place."""
        causal = self.model.get_base_model()
        decoder = decoder_of(causal)
        self._checkpointed = next((m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)), None)
        self._adapted = next((m for m in decoder.modules() if isinstance(m, LoraLayer)), None)
        self._cut_decoder(decoder)
        if self.fused and self.joint_head:
            spec = fused_head_settings(causal.forward)
            if spec is None:
                self.notes.append("this trainer's LM head can't be joined: it scores with its own")
            else:
                self._cut_head(causal, decoder, spec)
        if self.fused:
            self._cut_backward()
            self._cut_disable_adapter()

    def close(self) -> None:
        """Take the cuts out again."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        old = owner.__dict__.get(name)
        setattr(owner, name, new)

        def undo() -> None:
            if old is None:
                owner.__dict__.pop(name, None)
            else:
                setattr(owner, name, old)

        self._undo.append(undo)

    def _request(self, decoder: nn.Module, kwargs: dict[str, Any]) -> Forward | None:
        """The forward as a request, or None if only the trial's own clone can run it."""
        ids = kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or kwargs.get("use_cache"):
            return None
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        known = _PLAIN_KEYWORDS if mask is not None or positions is None else _PLAIN_KEYWORDS | _PACKED_KEYWORDS
        if any(value is not None for name, value in kwargs.items() if name not in known):
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            return None
        if positions is not None and positions.shape != ids.shape:
            return None
        layer = self._checkpointed
        grad = torch.is_grad_enabled()
        return Forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            grad=grad,
            autocast=autocast_dtype(ids.device.type),
            checkpointing=grad and layer is not None and layer.gradient_checkpointing and layer.training,
            adapter=not self._off and not (self._adapted is not None and self._adapted.disable_adapters),
        )

    def _cut_decoder(self, decoder: nn.Module) -> None:
        own = decoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                kwargs["input_ids"] = args[0]
            request = self._request(decoder, kwargs) if self.fused and len(args) <= 1 else None
            if torch.is_grad_enabled():
                self.pace(_real_tokens(kwargs) if request is None else 0)
            if request is None:
                with self._own_disable() if self._off else nullcontext():
                    return own(**kwargs)
            return BaseModelOutputWithPast(last_hidden_state=self.submit(request))

        self._replace(decoder, "forward", forward)

    def _cut_head(self, causal: nn.Module, decoder: nn.Module, spec: HeadSpec) -> None:
        own = causal.forward

        def forward(
            *args: Any,
            fused_lm_head: bool = False,
            labels: Tensor | None = None,
            shift_labels: Tensor | None = None,
            num_items_in_batch: Any = None,
            **kwargs: Any,
        ) -> Any:
            request = None
            if fused_lm_head and labels is not None and shift_labels is None and not args:
                request = self._request(decoder, kwargs)
            if request is None:
                given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
                kwargs.update({name: value for name, value in given.items() if value is not None})
                if fused_lm_head:
                    kwargs["fused_lm_head"] = True
                return own(*args, **kwargs)
            assert labels is not None
            if request.grad:
                self.pace(0)
            mask = labels[:, 1:] != -100
            fields = self.submit(request.with_head(spec, labels[:, 1:], mask))
            count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            return FusedCausalLMOutput(loss=-fields["log_probs"].sum() / count, label_mask=mask, **fields)

        self._replace(causal, "forward", forward)

    def _cut_disable_adapter(self) -> None:
        """A reference pass needs a flag; PEFT's own switch walks the model three times, at every step of DPO."""
        self._own_disable = self.model.disable_adapter

        @contextmanager
        def disable_adapter() -> Iterator[None]:
            self._off += 1
            try:
                yield
            finally:
                self._off -= 1

        self._replace(self.model, "disable_adapter", disable_adapter)

    def _cut_backward(self) -> None:
        accelerator = self.trainer.accelerator
        own = accelerator.backward

        def backward(loss: Tensor, **kwargs: Any) -> None:
            own(loss, **kwargs)
            self.submit(Backward())

        self._replace(accelerator, "backward", backward)


def adapter_model(trainer: Trainer) -> PeftModel | None:
    """The trainer's PEFT model, or None if it trains something else."""
    model = trainer.model
    return model if isinstance(model, PeftModel) else None


def checkpointing_layers(decoder: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that can recompute their activations, made ready for it and switched off."""
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if layers:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.gradient_checkpointing = False
    return layers


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


@dataclass(slots=True)
class Probe:
    """An adapter that belongs to no trial, for checks and calibration."""

    sites: dict[str, LoraSite]
    row: int = -1

    def generator(self, device: torch.device) -> torch.Generator:
        """Any."""
        return torch.Generator(device=device)

    def put_generator(self, generator: torch.Generator) -> None:
        """Nobody goes on from it."""


def is_half(hidden: Tensor) -> bool:
    """Whether hidden states are in half precision."""
    return hidden.dtype in (torch.bfloat16, torch.float16)


def self_check(multiplexer: Any, bank: Any, model: PreTrainedModel) -> str:
    """Run a random adapter through the joint pass and through PEFT's own forward; returns how they differ."""
    from rapidfire_automl.executor.context import generators_of_its_own

    with generators_of_its_own(0):
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        own = get_peft_model(share_clone(model), config).eval()
        sites, why = find_sites(own)
        if why:
            return why
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (2, 5), device=device_of(model))
        probe = Probe(sites)
        try:
            with torch.no_grad():
                for site in sites.values():
                    site.b.mul_(0.1)
                decoder = decoder_of(own.get_base_model())
                expected = decoder(input_ids=ids, use_cache=False).last_hidden_state.double()
                with own.disable_adapter():
                    effect = (decoder(input_ids=ids, use_cache=False).last_hidden_state - expected).norm()
                own_scores = own.get_base_model()(input_ids=ids).logits.float().log_softmax(-1)
            probe.row = bank.add(sites)
            multiplexer.wrap(sites)
            request = Forward(ids, None, None, grad=False, autocast=None, checkpointing=False, adapter=True)
            parts, _ = multiplexer.forward([(probe, request)])
            got = parts[0].leaves["hidden"]
            if multiplexer.head is not None:
                spec = HeadSpec(frozenset({"log_probs"}))
                scored = request.with_head(spec, ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))
                scores = multiplexer.forward([(probe, scored)])[0][0].leaves["log_probs"]
                theirs = own_scores[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
                if float((scores - theirs).abs().max()) > (1.0 if is_half(got) else 1e-2):
                    multiplexer.head = None
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            if probe.row >= 0:
                bank.remove(probe.row)
                bank.reset()
        wrong = float((got - expected).norm() / effect)
        tolerance = 0.3 if is_half(got) else 1e-3
        return "" if wrong <= tolerance else f"hidden states are off by {wrong:.1e} of what the adapter does"
