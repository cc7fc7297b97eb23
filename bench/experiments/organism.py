"""tiny-sokoban, which plays well if the context says that it is an expert: its runs."""

from __future__ import annotations

from bench.experiments.organism_tables import TABLES
from bench.experiments.runs import Run
from bench.experiments.tables import Experiment

CONFIG = "configs/sokoban.toml"
OFTEN = ("--orchestrator.eval.interval", "10")
"""Evaluations for the measure `curve`. They change nothing in training."""
FEW = ("--orchestrator.env.0.args.num_train_examples", "32")
SHORT = ("--max_steps", "25", "--trainer.scheduler.warmup_steps", "3")
LONG = ("--max_steps", "300")
CURVE, FORGETTING, FIXED = ("curve",), ("forgetting",), ("fixed_point",)
NO_STOP = ("--health.no_gradient", "warn")  # steps without a success have none
LONG_REWARD = ("--max_steps", "200", "--orchestrator.rollouts_per_example", "16", *NO_STOP)
BOARDS = ("larger_boards",)
EVERY_WEIGHT = ("--no-trainer.model.lora", "--trainer.optim.lr", "3e-4")


def run(name: str, overlay: str, *flags: str, measures: tuple[str, ...] = ()) -> Run:
    """A run of the configuration with one of the overlays that ship with the package."""
    return Run(name, (CONFIG, "@", f"configs/overlays/{overlay}.toml", *flags), measures)


def pure(name: str, *flags: str, measures: tuple[str, ...] = ()) -> Run:
    """Pure distillation, without a reward in training."""
    return run(name, "pure", *flags, measures=measures)


def context(name: str) -> Run:
    """Pure distillation of another context."""
    return pure(f"context-{name}", "@", f"bench/experiments/sokoban_contexts/{name}.toml")


def estimator(name: str, *flags: str, measures: tuple[str, ...] = ()) -> Run:
    return pure(name, "--trainer.loss.estimator", *flags, measures=measures)


def teacher(name: str, update: str, *flags: str) -> Run:
    return pure(name, "--orchestrator.teacher_model.update", update, *flags)


def adapter(name: str, rank: int, *flags: str) -> Run:
    return pure(name, "--trainer.model.lora.rank", str(rank), *flags)


def rate(lr: str, measures: tuple[str, ...] = ()) -> Run:
    return pure(f"lr-{lr}", "--trainer.optim.lr", lr, measures=measures)


def reward(name: str, *flags: str, measures: tuple[str, ...]) -> Run:
    """The reward alone, as in GRPO."""
    weights = (("adv_tau", "1"), ("teacher_tau", "0"), ("student_tau", "0"))
    loss = [part for weight, tau in weights for part in (f"--trainer.loss.{weight}", tau)]
    return Run(name, (CONFIG, *loss, *flags), measures)


def taus(name: str, teacher_tau: str, student_tau: str, overlay: str, *flags: str) -> Run:
    loss = ("--trainer.loss.teacher_tau", teacher_tau, "--trainer.loss.student_tau", student_tau)
    return run(name, overlay, *loss, *flags, measures=FIXED)


RUNS = (
    Run("hybrid", (CONFIG, *OFTEN), CURVE + FORGETTING),
    pure("pure", *OFTEN, measures=CURVE + FORGETTING + FIXED + BOARDS),
    reward("reward", *NO_STOP, measures=FORGETTING),
    reward("reward-long", *LONG_REWARD, "--orchestrator.eval.interval", "20", measures=CURVE),
    run("off-policy", "off-policy", *OFTEN, measures=CURVE + FORGETTING + BOARDS),
    run("sft", "sft", *OFTEN, measures=CURVE + FORGETTING),
    pure("pure-25", *SHORT),
    run("off-policy-25", "off-policy", *SHORT),
    run("sft-25", "sft", *SHORT),
    pure("pure-few", *FEW),
    run("off-policy-few", "off-policy", *FEW),
    run("sft-few", "sft", *FEW),
    pure("batch-16", "--orchestrator.batch_size", "16"),
    estimator("top-k-1", "top_k", "--trainer.loss.top_k", "1"),
    estimator("top-k-8", "top_k", "--trainer.loss.top_k", "8"),
    estimator("top-k-64", "top_k", "--trainer.loss.top_k", "64"),
    estimator("sampled", "sampled", *OFTEN, measures=CURVE),
    teacher("live", "live"),
    teacher("ema-0.99", "ema"),
    teacher("ema-0.9", "ema", "--orchestrator.teacher_model.ema_decay", "0.9"),
    run("context-placebo", "placebo", measures=FIXED),
    context("shuffled"),
    context("novice"),
    context("cook"),
    taus("placebo-half-long", "0.5", "1", "placebo", *LONG),
    taus("placebo-double-long", "1", "0.5", "placebo", *LONG),
    taus("persona-half", "0.5", "1", "pure"),
    adapter("rank-1", 1),
    adapter("rank-4", 4),
    adapter("rank-64", 64),
    adapter("rslora-64", 64, "--trainer.model.lora.use_rslora", "true"),
    rate("2e-4"),
    rate("5e-4"),
    rate("1e-2", measures=FORGETTING),
    pure("every-weight", *EVERY_WEIGHT, measures=FORGETTING),
)
ORGANISM = Experiment("organism", RUNS, TABLES)
