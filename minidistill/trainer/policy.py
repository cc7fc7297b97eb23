"""The trainer's models, and which weights each role runs with.

Under LoRA the student, the base and a moving average are one model with its adapters on or off.
With full fine-tuning every set of weights but the student's is a model of its own, loaded only if
the teacher needs it.

Shapes: `_H` hidden, `_V` vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidistill.placement.attention import TRANSFORMERS_CHOICE, Attention
from minidistill.placement.limits import fp32_copy_bytes
from minidistill.trainer.distributed.fsdp import ShardedModels, full_tensor, sharded_like
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.trainer.half_weights import HalfWeights
from minidistill.trainer.head import PRODUCT, LogitMap
from minidistill.trainer.modes import set_dropout, without_adapters
from minidistill.types import Role
from minidistill_kernels import Head


class Weights(Enum):
    """A set of weights. For an adapter, the value is its name in peft."""

    STUDENT = "default"  # peft's name for a single adapter, so that a saved one is plain PEFT
    BASE = "base"
    EMA = "ema"
    OTHER = "other"
    """Those of a teacher that is another model."""


@dataclass(slots=True)
class Policy:
    """The model that is trained, and the models that serve as its teacher.

    `model` is peft's wrapper under LoRA, else transformers' model. `eos_ids` end a completion.
    """

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    device: torch.device
    teacher_weights: Weights = Weights.BASE
    """What the teacher runs with. Only an engine may hold them: see `holds`."""
    reference_models: dict[Weights, Any] = field(default_factory=dict)
    """Models beside `model`, by the weights they hold."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while the student's weights change, and while an engine is sent them."""
    rank_group: RankGroup = field(default_factory=RankGroup)
    sharded: ShardedModels | None = None
    """The models as FSDP runs them, if the ranks shard the weights."""
    attention: Attention = TRANSFORMERS_CHOICE
    """Of all models."""
    logit_map: LogitMap = PRODUCT
    """Of the student's model, and of the teacher's unless it is another one."""
    other_logit_map: LogitMap = PRODUCT
    """Of a teacher that is another model."""
    dropout: bool = False
    """Whether the adapter's dropout is on in this pass. The model's own is always off."""
    pads_prompts: bool = True
    """Whether prompts of different lengths can be sampled from together, padded on the left."""
    can_sample: bool = True
    """Whether these models can be sampled from in this process."""
    starts_as_base: bool = True
    """Before training, the student is the model as it was loaded, and not a trained adapter."""
    half_weights: HalfWeights = field(default_factory=HalfWeights)
    """Copies of the frozen weights, which sampling on a CPU makes."""
    _current: Any = None
    _averages: dict[str, Tensor] = field(default_factory=dict)
    """The averaged weights in fp32, if the model computes in half precision."""

    @property
    def lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def student(self) -> Any:
        """The trained model as transformers' class, with its head."""
        return self.model.get_base_model() if self.lora else self.model

    @property
    def causal(self) -> Any:
        """The current role's model as transformers' class, with its head."""
        return self.student if self._current is None else self._current

    @property
    def config(self) -> Any:
        return self.causal.config

    @property
    def body(self) -> nn.Module:
        """The transformer without its LM head; returns the final (normed) hidden states.

        With sharded weights every rank must run it, except within `unsharded`.
        """
        return self.sharded.headless(self.causal) if self.sharded else self.causal.base_model

    @property
    def head_VH(self) -> Tensor:
        """The LM head's weight, frozen under LoRA. A sharded one is a full tensor after a pass."""
        return self.causal.get_output_embeddings().weight

    @property
    def head(self) -> Head:
        """The LM head with its bias, and what the model does to its product."""
        module = self.causal.get_output_embeddings()
        other = self._current is not None and self._current is self.reference_models.get(
            Weights.OTHER
        )
        logit_map = self.other_logit_map if other else self.logit_map
        bias = getattr(module, "bias", None)
        return Head(module.weight, bias, logit_map.scale, logit_map.cap)

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters by name, in a fixed order."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def adapter_parameters(self) -> set[nn.Parameter]:
        """All adapters' parameters, trained or not. Empty with full fine-tuning."""
        named = self.model.named_parameters()
        return {p for n, p in named if self.lora and ".lora_" in n}

    @property
    def pad_id(self) -> int:
        pad_id: int | None = self.tokenizer.pad_token_id
        return min(self.eos_ids, default=0) if pad_id is None else pad_id

    @property
    def dtype(self) -> torch.dtype:
        return self.head_VH.dtype

    @property
    def frozen_teacher(self) -> bool:
        """Whether the teacher's weights never change in a run."""
        return self.teacher_weights in (Weights.BASE, Weights.OTHER)

    def weights_of(self, role: Role) -> Weights:
        """The weights that a role runs with."""
        if role is Role.TEACHER:
            return self.teacher_weights
        return Weights.STUDENT if role is Role.STUDENT else Weights.BASE

    def holds(self, role: Role) -> bool:
        """Whether the role's weights are in this process."""
        return self._holds(self.weights_of(role))

    def _holds(self, weights: Weights) -> bool:
        if weights in self.reference_models or weights is Weights.STUDENT:
            return True
        return self.lora and (weights is Weights.BASE or weights.value in self.model.peft_config)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Turn off the adapter's dropout."""
        if not self.dropout:
            yield
            return
        self._set_dropout(False)
        try:
            yield
        finally:
            self._set_dropout(True)

    def _set_dropout(self, on: bool) -> None:
        self.dropout = on
        set_dropout(self.model, on)

    @contextlib.contextmanager
    def unsharded(self, *roles: Role) -> Iterator[None]:
        """Unshard the weights of these roles, so that their passes need no other rank."""
        if self.sharded is None:
            yield
            return
        with self.rank_group.run_on_all_ranks(Unshard(roles)):
            self.unshard(roles)
        try:
            yield
        finally:
            if not self.rank_group.broken:
                with self.rank_group.run_on_all_ranks(Reshard()):
                    self.reshard()

    def unshard(self, roles: Sequence[Role]) -> None:
        """Keep the weights of these roles in full on this rank. A collective."""
        if self.sharded is not None:
            weights = [self.weights_of(role) for role in roles]
            self.sharded.unshard([self.reference_models.get(w, self.student) for w in weights])

    def reshard(self) -> None:
        """Keep a shard of every weight on this rank again, if weights are sharded."""
        if self.sharded is not None:
            self.sharded.reshard()

    @contextlib.contextmanager
    def running_as(self, role: Role) -> Iterator[None]:
        """Run passes with a role's weights. Raises KeyError if this process does not hold them."""
        weights = self.weights_of(role)
        if weights in self.reference_models:
            before, self._current = self._current, self.reference_models[weights]
            try:
                yield
            finally:
                self._current = before
        elif weights is Weights.STUDENT:
            yield
        elif not self._holds(weights):
            raise KeyError(f"this process does not hold the {role.value}'s weights")
        elif weights is Weights.BASE:
            with without_adapters(self.model):
                yield
        else:
            self.model.base_model.set_adapter(weights.value, inference_mode=True)
            try:
                yield
            finally:
                self.model.base_model.set_adapter(Weights.STUDENT.value)

    def free_cached_memory(self) -> None:
        """Give the GPU memory that torch caches on every rank back, for an engine that wakes.

        Returns on the driver once all ranks have done it.
        """
        with self.rank_group.run_on_all_ranks(FreeCachedMemory()):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.rank_group.gather_object(None)

    def add_ema(self) -> None:
        """A second set of trained weights, equal to the student's now, for an averaged teacher."""
        if self.lora:
            student = Weights.STUDENT.value
            self.model.add_adapter(
                Weights.EMA.value,
                self.model.peft_config[student],
                autocast_adapter_dtype=all(p.dtype == torch.float32 for _, p in self.parameters),
            )
            self.model.base_model.set_adapter(student)
            for (_, trained), average in zip(self.parameters, self._ema().values(), strict=True):
                average.data = average.data.to(trained.dtype)  # peft makes 4-bit layers' fp32
            set_dropout(self.model, self.dropout)
            self.update_ema(0.0)
        else:
            self.reference_models[Weights.EMA] = frozen_copy(self.model)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema ← decay * ema + (1 - decay) * student, in fp32."""
        averages = self._ema_in_fp32()
        for name, parameter in self.parameters:
            averages[name].lerp_(parameter.to(averages[name].dtype), 1 - decay)
        self._round_ema()

    def _ema_in_fp32(self) -> dict[str, Tensor]:
        """The averaged weights, or fp32 copies of those in half precision, which lose updates."""
        weights = self._ema()
        for name, weight in weights.items():
            if fp32_copy_bytes(weight.itemsize) and name not in self._averages:
                self._averages[name] = weight.detach().float()
        return weights | self._averages

    @torch.no_grad()
    def _round_ema(self) -> None:
        """Give the model the averages that are kept in fp32."""
        for name, weight in self._ema().items() if self._averages else ():
            if name in self._averages:
                weight.copy_(self._averages[name])

    def _ema(self) -> dict[str, Tensor]:
        """The averaged weights, under the names of the student's parameters."""
        if not self.lora:
            named = dict(self.reference_models[Weights.EMA].named_parameters())
            return {n: named[n] for n, _ in self.parameters}
        named = dict(self.model.named_parameters())
        # a layer's tensors end in ".default.weight", an embedding's in ".default"
        student, ema = (f".{weights.value}" for weights in (Weights.STUDENT, Weights.EMA))
        return {n: named[ema.join(n.rsplit(student, 1))] for n, _ in self.parameters}

    def adapter(self, weights: Weights) -> list[tuple[str, Tensor]]:
        """An adapter's tensors under the names of a PEFT file."""
        marker = f".{weights.value}.weight"
        named = self.model.named_parameters()
        return [(n.replace(marker, ".weight"), p) for n, p in named if n.endswith(marker)]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All of the student's weights under Hugging Face's names, tied ones only once.

        Sharded weights are gathered one at a time, by all ranks together.
        """
        if self.sharded is None:
            yield from self.student.named_parameters()
            return
        for index, (name, _) in enumerate(self.sharded.weights):
            with self.rank_group.run_on_all_ranks(GatherWeight(index)):
                value = self.gather_weight(index)
            yield name, value

    @torch.no_grad()
    def gather_weight(self, index: int) -> Tensor:
        """One of the student's sharded weights in full. A collective."""
        assert self.sharded is not None
        return full_tensor(self.sharded.weights[index][1])

    def state(self) -> dict[str, Tensor]:
        """What training changes, for a checkpoint: "student/<name>", "ema/<name>"."""
        state: dict[str, Tensor] = {f"student/{n}": p for n, p in self.parameters}
        if self.teacher_weights is Weights.EMA and self._holds(Weights.EMA):
            averages = self._ema_in_fp32()
            state |= {f"ema/{n}": averages[n] for n, _ in self.parameters}
        return state

    @torch.no_grad()
    def load_state(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Restore what `state` returned."""
        current = self.state()
        for name, value in state:
            current[name].copy_(sharded_like(value, current[name]))
        self._round_ema()


class HoldsPolicy(Protocol):
    """What the commands below need of a rank's trainer."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class Unshard:
    """Command: keep the weights of these roles in full on every rank."""

    roles: tuple[Role, ...]

    def run(self, trainer: HoldsPolicy) -> None:
        trainer.policy.unshard(self.roles)


@dataclass(frozen=True, slots=True)
class Reshard:
    """Command: keep a shard of every weight on each rank again."""

    def run(self, trainer: HoldsPolicy) -> None:
        trainer.policy.reshard()


@dataclass(frozen=True, slots=True)
class FreeCachedMemory:
    """Command: give the memory that torch caches back to the GPU."""

    def run(self, trainer: HoldsPolicy) -> None:
        trainer.policy.free_cached_memory()


@dataclass(frozen=True, slots=True)
class GatherWeight:
    """Command: take part in gathering one of the student's weights."""

    index: int

    def run(self, trainer: HoldsPolicy) -> None:
        trainer.policy.gather_weight(self.index)


def frozen_copy(model: Any) -> Any:
    """A copy of the model that shares no memory with it and is not trained."""
    return copy.deepcopy(model).requires_grad_(False).eval()
