"""The interface of an estimator, which turns the log-prob terms of the objective into a loss.

The configuration imports this package for the estimators' names, so torch and the kernels are
imported inside the methods.

Shapes: `_N` completion tokens, `_K` ids scored at each token, `_H` hidden, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, TypedDict

from minidistill.types import Completion, TeacherScores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minidistill_kernels import DistillOutput, Head


class TeacherNeeds(Enum):
    """What an estimator needs of the teacher at each completion token."""

    ALL_LOGITS = "all logits"
    """Only a teacher that runs in the trainer provides them."""
    SAMPLED_LOGPROBS = "the log-prob of the sampled token"
    LOGPROBS_AT_IDS = "log-probs at chosen ids"


class TeacherInputs(TypedDict, total=False):
    """The teacher's arguments of `minidistill_kernels.linear_distill`."""

    h_t_NH: Tensor
    """Hidden states, if the teacher runs in the trainer."""
    teacher_weight: Head | None
    """The teacher's head, if it is not the student's."""
    teacher_logp_N: Tensor
    """Log-probs, if an engine scored the teacher. So are the two below."""
    topk_ids_NK: Tensor
    teacher_topk_logp_NK: Tensor


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The objective's coefficients and limits, as `trainer.loss` documents them."""

    adv_tau: float
    teacher_tau: float
    student_tau: float
    temperature: float
    """The sampling temperature, at which all log-probs are taken."""
    top_k: int
    ratio_clip_high: float
    token_mask_low: float
    token_mask_high: float
    kl_clip: float | None
    """None is no clip."""


class Estimator:
    """One way to turn the objective into a loss for each token.

    To add one, write a subclass in a file of its own and list it in
    `minidistill/estimators/__init__.py`.
    """

    name: str
    """As in `trainer.loss.estimator`."""
    needs: TeacherNeeds
    imitates: bool = False
    """It makes the samples themselves likelier, which must be the teacher's, without an importance
    ratio."""
    default_kl_clip: float | None = None
    """What `trainer.loss.kl_clip = "auto"` means, in nats. None is no clip."""
    kernel_mode: str
    """The `estimator` argument of the kernel."""

    def __str__(self) -> str:
        return self.name

    @property
    def reason_for_trainer(self) -> str | None:
        """Why the teacher must run in the trainer; None if an engine can serve it."""
        if self.needs is TeacherNeeds.ALL_LOGITS:
            return f"`{self.name}` needs all of the teacher's logits"
        return None

    def top_ids(self, top_k: int) -> int:
        """How many of the sampler's most likely ids a teacher's engine must score at each token."""
        return 0

    def engine_scores(
        self,
        scores: Sequence[TeacherScores],
        completions: Sequence[Completion],
        device: torch.device,
    ) -> TeacherInputs:
        """An engine's scores of a micro-batch as the kernel's inputs.

        Raises ValueError for an estimator that no engine can serve.
        """
        raise ValueError(f"{self.name} needs {self.needs.value}, which no engine gives")

    def loss_function(self, settings: LossSettings) -> Callable[..., DistillOutput]:
        """A function that computes the loss of each sampled token and the figures behind it.

        It takes the arguments of `minidistill_kernels.linear_distill` that change from batch to
        batch: the student's hidden states (N, H), the head, the sampled tokens (N,), the
        teacher's inputs, `advantage_N` and `sampler_logp_N`.
        """
        from minidistill_kernels import linear_distill

        return partial(linear_distill, estimator=self.kernel_mode, **asdict(settings))

    def split(
        self, output: DistillOutput, advantage_N: Tensor, settings: LossSettings
    ) -> tuple[float, float]:
        """The metrics `loss/policy` and `loss/kl` of a whole step, from float64 columns.

        By default the reward term, and the rest of the loss.
        """
        kept_N = (~output.masked).double()
        rho_N = output.ratio.clamp(max=settings.ratio_clip_high)
        policy_N = -rho_N * settings.adv_tau * advantage_N * output.logp * kept_N
        policy = float(policy_N.mean())
        return policy, float(output.loss.mean()) - policy
