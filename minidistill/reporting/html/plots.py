"""Which metrics the charts show, and how to read each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Values = Mapping[str, float]
_PHASES = ("sample", "score", "teacher", "wait", "train", "sync")

Curve = str | Callable[[Values], float | None]
"""A metric's name, or what computes a value from a step's metrics, None where it cannot."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart of metrics: (name in the legend, metric) pairs. Curves in `marked` have dots."""

    title: str
    note: str
    curves: tuple[tuple[str, Curve], ...]
    zero: bool = False
    marked: tuple[str, ...] = ()


def step_rate(values: Values) -> float | None:
    """Completion tokens a second of the whole step."""
    if (rate := values.get("perf/tokens_per_second")) is not None:
        return rate
    seconds = values.get("time/step", 0.0)
    for phase in ("train", "sample"):
        time, rate = values.get(f"time/{phase}"), values.get(f"perf/{phase}_tokens_per_second")
        if time is not None and rate is not None and seconds > 0:
            return time * rate / seconds
    return None


def _idle(*busy: str) -> Callable[[Values], float | None]:
    """The share of a step in which none of these phases was going on."""

    def share(values: Values) -> float | None:
        seconds, known = values.get("time/step", 0.0), [values.get(f"time/{b}") for b in busy]
        if not seconds > 0 or known[0] is None:
            return None
        return max(0.0, 1 - sum(time for time in known if time is not None) / seconds)

    return share


LEARNING = (
    Plot(
        "Teacher KL",
        "KL(student‖teacher) on the completions that are trained on, in nats per token. Lower is "
        "more similar; at 0 the student behaves as if it had read the context. If sample_from is "
        "\"teacher\" they are the teacher's: see the held-out KL for the student's own.",
        (("teacher_kl", "teacher_kl"),),
        zero=True,
    ),
    Plot(
        "Held-out KL",
        "The KL on the student's answers to prompts that training never uses, in nats per token.",
        (("eval/heldout_kl", "eval/heldout_kl"),),
        zero=True,
        marked=("eval/heldout_kl",),
    ),
    Plot(
        "Reward",
        "Mean reward of the training rollouts. The tasks change from step to step, so single steps "
        "are noisy; evaluations use fixed tasks.",
        (("reward/mean", "reward/mean"),),
        zero=True,
    ),
    Plot(
        "Loss",
        "The reward term and the distillation term. The reward term stays near 0 by design: judge "
        "a run by its reward and KL, not by its loss.",
        (("loss/policy", "loss/policy"), ("loss/kl", "loss/kl")),
    ),
    Plot(
        "Entropy",
        "In nats per token. The two curves should converge. If the student's entropy falls to 0 "
        "and the teacher's does not, the student has collapsed.",
        (("entropy/student", "entropy/student"), ("entropy/teacher", "entropy/teacher")),
        zero=True,
    ),
)
COMPLETIONS = (
    Plot(
        "Completion length",
        "Mean length in tokens. A steady climb to the limit often means that the student no longer "
        "learns when to stop.",
        (
            ("completions/length_mean", "completions/length_mean"),
            ("eval/completions/length_mean", "eval/completions/length_mean"),
        ),
        zero=True,
        marked=("eval/completions/length_mean",),
    ),
    Plot(
        "Completions cut off",
        "Share of the completions that reached max_tokens before they ended.",
        (("completions/truncated_frac", "completions/truncated_frac"),),
        zero=True,
    ),
    Plot(
        "Sampler mismatch",
        "How far the sampler's probabilities are from the trainer's (mean of ρ - log ρ - 1). It is "
        "near 0 if both compute the same; growth means stale weights or different numerics.",
        (("kl/sampler_mismatch", "kl/sampler_mismatch"),),
        zero=True,
    ),
    Plot(
        "Gradient norm",
        "Before clipping. Single peaks are usual; a climb that lasts says that the learning rate "
        "is too high.",
        (("optim/grad_norm", "optim/grad_norm"),),
        zero=True,
    ),
)
COST = (
    Plot(
        "Throughput",
        "Tokens of completions a second: of whole steps, and of their two long phases alone.",
        (
            ("whole step", step_rate),
            ("sampling", "perf/sample_tokens_per_second"),
            ("training", "perf/train_tokens_per_second"),
        ),
        zero=True,
    ),
    Plot(
        "Phase times",
        "Seconds of a step in each phase. Phases that overlap add up to more than the step.",
        (*((name, f"time/{name}") for name in _PHASES), ("whole step", "time/step")),
        zero=True,
    ),
    Plot(
        "Idle time",
        "Share of a step in which the trainer, or the sampler, had nothing to do. If both run on "
        "one device, that works for the one while the other is idle.",
        (("trainer", _idle("train", "sync")), ("sampler", _idle("sample"))),
        zero=True,
    ),
    Plot(
        "Memory",
        "Peak in GiB: on a GPU what was allocated, on a CPU the whole process, libraries included.",
        (
            ("trainer", "perf/peak_memory_gib/trainer"),
            ("engine", "perf/peak_memory_gib/engine"),
        ),
        zero=True,
    ),
)
GROUPS = (("Learning", LEARNING), ("Completions", COMPLETIONS), ("Time and memory", COST))
PLOTS = tuple(plot for _, plots in GROUPS for plot in plots)
