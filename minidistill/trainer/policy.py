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
from typing import Any

import torch
from torch import Tensor, nn

from minidistill.trainer.distributed import fsdp as sharding
from minidistill.trainer.distributed.rank_group import World
from minidistill.types import Role


class Weights(Enum):
    """A set of weights. The value is the adapter's name in peft, where it is an adapter."""

    STUDENT = "default"  # peft's own name for a single adapter, so that a saved one is plain PEFT
    BASE = "base"
    EMA = "ema"
    OTHER = "other"
    """Those of a teacher that is another model."""


@dataclass(slots=True)
class Policy:
    """The model that is trained, and the teacher's beside it.

    `model` is peft's wrapper under LoRA, else transformers' own model. `eos_ids` end a completion.
    """

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    device: torch.device
    teacher_weights: Weights = Weights.BASE
    """What the teacher runs with. They may be in an engine only: see `holds`."""
    reference_models: dict[Weights, Any] = field(default_factory=dict)
    """Models beside `model`, by the weights they hold."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while the student's weights change, and while an engine is sent them."""
    world: World = field(default_factory=World)
    trunks: list[Any] = field(default_factory=list)
    """The models as FSDP runs them, where the ranks divide the weights; else none."""
    exchanges: sharding.Exchanges = field(default_factory=sharding.Exchanges)
    divided: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    """The student's weights as this rank keeps them between passes, where they are divided."""
    _current: Any = None

    @property
    def lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def student(self) -> Any:
        """transformers' model that is trained, with its head."""
        return self.model.get_base_model() if self.lora else self.model

    @property
    def causal(self) -> Any:
        """transformers' model of the current role."""
        return self.student if self._current is None else self._current

    @property
    def config(self) -> Any:
        return self.causal.config

    @property
    def body(self) -> nn.Module:
        """The transformer without its LM head; returns the final (normed) hidden states.

        Where weights are divided every rank must run it, unless they are gathered (`whole`).
        """
        trunk = next((t for t in self.trunks if t.causal is self.causal), None)
        return trunk or self.causal.base_model

    @property
    def head_VH(self) -> Tensor:
        """The LM head's weight. Frozen under LoRA. Divided weights are whole after a pass alone."""
        return self.causal.get_output_embeddings().weight

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters by name, in a fixed order."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def pad_id(self) -> int:
        id = self.tokenizer.pad_token_id
        return id if id is not None else min(self.eos_ids)

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
        return torch.nn.functional.linear(hidden, self.head_VH)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Dropout and activation checkpointing off."""
        training = self.model.training
        if not training:
            yield
            return
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    @contextlib.contextmanager
    def whole(self, *roles: Role) -> Iterator[None]:
        """Gather divided weights of these roles here, so that their passes need no other rank."""
        if not self.trunks:
            yield
            return
        with self.world.together("policy.gather", roles):
            self.gather(roles)
        try:
            yield
        finally:
            if not self.world.broken:
                with self.world.together("policy.release"):
                    self.release()

    def gather(self, roles: Sequence[Role]) -> None:
        """What `whole` does on every rank."""
        weights = [self.weights_of(role) for role in roles]
        models = [self.reference_models.get(w, self.student) for w in weights]
        for trunk in self.trunks:
            if any(trunk.causal is model for model in models):
                sharding.gather(trunk)

    def release(self) -> None:
        """Keep nothing whole that can be gathered again."""
        for trunk in self.trunks:
            sharding.release(trunk)

    @contextlib.contextmanager
    def running_as(self, role: Role) -> Iterator[None]:
        """Run passes with a role's weights. Raises KeyError for weights that are not here."""
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
            with self.model.disable_adapter():
                yield
        else:
            self.model.base_model.set_adapter(weights.value, inference_mode=True)
            try:
                yield
            finally:
                self.model.base_model.set_adapter(Weights.STUDENT.value)

    def add_ema(self) -> None:
        """A second set of trained weights, equal to the student's now, for an averaged teacher."""
        if self.lora:
            student = Weights.STUDENT.value
            self.model.add_adapter(Weights.EMA.value, self.model.peft_config[student])
            self.model.base_model.set_adapter(student)
            self.update_ema(0.0)
        else:
            self.reference_models[Weights.EMA] = frozen_copy(self.model)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema ← decay * ema + (1 - decay) * student."""
        named = self._ema()
        for name, parameter in self.parameters:
            named[name].lerp_(parameter.to(named[name].dtype), 1 - decay)

    def _ema(self) -> dict[str, Tensor]:
        """The averaged weights, by the names of the student's parameters."""
        if not self.lora:
            return dict(self.reference_models[Weights.EMA].named_parameters())
        named = dict(self.model.named_parameters())
        student, ema = f".{Weights.STUDENT.value}.", f".{Weights.EMA.value}."
        return {n: named[n.replace(student, ema)] for n, _ in self.parameters}

    def adapter(self, weights: Weights) -> list[tuple[str, Tensor]]:
        """An adapter's tensors under the names of a PEFT file."""
        marker = f".{weights.value}.weight"
        named = self.model.named_parameters()
        return [(n.replace(marker, ".weight"), p) for n, p in named if n.endswith(marker)]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All of the student's weights under Hugging Face's names; tied ones come once.

        Divided ones are made whole one at a time, each by all ranks.
        """
        if not self.trunks:
            yield from self.student.named_parameters()
        for index, (name, _) in enumerate(self.divided):
            with self.world.together("policy.weight", index):
                value = self.weight(index)
            yield name, value

    @torch.no_grad()
    def weight(self, index: int) -> Tensor:
        """One of the divided weights, whole."""
        return sharding.whole(self.divided[index][1])

    def state(self) -> dict[str, Tensor]:
        """What training changes, for a checkpoint: "student/<name>", "ema/<name>"."""
        found: dict[str, Tensor] = {f"student/{n}": p for n, p in self.parameters}
        if self.teacher_weights is Weights.EMA and self._holds(Weights.EMA):
            average = self._ema()
            found |= {f"ema/{n}": average[n] for n, _ in self.parameters}
        return found

    @torch.no_grad()
    def load_state(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Put back what `state` gave."""
        here = self.state()
        for name, value in state:
            here[name].copy_(sharding.like(value, here[name]))


def frozen_copy(model: Any) -> Any:
    """The model again, in memory of its own, not to be trained."""
    return copy.deepcopy(model).requires_grad_(False).eval()
