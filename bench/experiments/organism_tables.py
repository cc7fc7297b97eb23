"""The tables of tiny-sokoban's runs, and the claims that they test."""

from __future__ import annotations

from bench.experiments.claims import EverySeed, Higher, Near
from bench.experiments.tables import (
    ADDED_BACK,
    BEFORE,
    DRIFT,
    GAP,
    IN_CONTEXT,
    KL_AFTER,
    KL_BEFORE,
    STUDENT,
    TOKENS,
    USUAL,
    WORST_GAP,
    Column,
    Row,
    Table,
    percent,
    whole,
)

AS_WELL = -0.02
"""The margin of "at most two points less"."""
SAME = Column("small talk unchanged", "same_answers", percent, "%", interval=True)
CHANGED = Column("student - before", "gain", percent, " points", interval=True)
WITH_CONTEXT = Column("student with context - without", "added_back", percent, " points", True)
POWER = Column("r, all tokens", "power", interval=True)
OPEN_POWER = Column("r, undecided tokens", "open_power", interval=True)
OPEN_TOKENS = Column("undecided tokens", "open_tokens", percent, "%")
POWER_KL = Column("KL to q^r", "power_kl")
PREDICTED_KL = Column("KL to q^(predicted r)", "predicted_kl")
TO_HALF = Column("samples to 50%", "samples_to_half", whole, interval=True)
TO_90 = Column("samples to 90%", "samples_to_90", whole)
MEAN_CLOSED = Column("mean over the run", "mean_closed", percent, "%", interval=True)

OBJECTIVES = Table(
    "objectives",
    "Teacher and reward",
    (
        Row("teacher and reward (0.5 / 0.5 / 0.5)", "hybrid"),
        Row("teacher alone", "pure"),
        Row("reward alone (adv_tau 1)", "reward"),
        Row("reward alone, 200 steps in groups of 16", "reward-long"),
    ),
    USUAL,
    (
        EverySeed(
            "`full` closes at least 90% of the gap in every seed.", "pure", "gap_closed", 0.9
        ),
        Higher(
            "The teacher alone closes at most two points less than teacher and reward.",
            "pure", "hybrid", margin=AS_WELL,
        ),
        Higher(
            "The teacher alone closes more than the reward alone, with equal samples.",
            "pure", "reward",
        ),
        Higher(
            "The teacher alone closes more than the reward alone with twice the samples, in groups "
            "of 16.",
            "pure", "reward-long",
        ),
    ),
)  # fmt: skip
ON_OFF = Table(
    "on_off",
    "On-policy and off-policy",
    (
        Row("on-policy", "pure"),
        Row("off-policy: the teacher's samples, full KL", "off-policy"),
        Row("SFT on the teacher's samples", "sft"),
    ),
    (BEFORE, IN_CONTEXT, STUDENT, GAP, WORST_GAP, KL_AFTER, DRIFT, TOKENS),
    (
        Higher("On-policy closes more of the gap than off-policy.", "pure", "off-policy"),
        Higher("On-policy closes more of the gap than SFT.", "pure", "sft"),
        Higher(
            "Off-policy leaves a larger held-out KL, on the student's own answers.",
            "off-policy", "pure", "heldout_kl_after",
        ),
        Higher("Off-policy with full logits closes more than SFT.", "off-policy", "sft"),
    ),
)  # fmt: skip
SMALL_DATA = Table(
    "small_data",
    "On-policy and off-policy, with little data",
    (
        Row("on-policy, 25 steps", "pure-25"),
        Row("off-policy, 25 steps", "off-policy-25"),
        Row("SFT, 25 steps", "sft-25"),
        Row("on-policy, 100 steps on 32 levels", "pure-few"),
        Row("off-policy, 100 steps on 32 levels", "off-policy-few"),
        Row("SFT, 100 steps on 32 levels", "sft-few"),
    ),
    (BEFORE, IN_CONTEXT, STUDENT, GAP, WORST_GAP, KL_AFTER, DRIFT, TOKENS),
    (
        Higher(
            "In 25 steps on-policy closes more of the gap than off-policy.",
            "pure-25", "off-policy-25",
        ),
        Higher(
            "On 32 levels on-policy closes more of the gap than off-policy.",
            "pure-few", "off-policy-few",
        ),
        Higher("On 32 levels on-policy closes more of the gap than SFT.", "pure-few", "sft-few"),
    ),
)  # fmt: skip
ESTIMATORS = Table(
    "estimators",
    "Estimators",
    (
        Row("`full`", "pure"),
        Row("`top_k`, k = 64", "top-k-64"),
        Row("`top_k`, k = 8", "top-k-8"),
        Row("`top_k`, k = 1", "top-k-1"),
        Row("`sampled`", "sampled"),
    ),
    USUAL,
    (
        Higher(
            "`top_k` with k = 64 closes at most two points less than `full`.",
            "top-k-64", "pure", margin=AS_WELL,
        ),
        Higher(
            "`top_k` with k = 8 closes at most two points less than `full`.",
            "top-k-8", "pure", margin=AS_WELL,
        ),
        Higher("`top_k` with k = 1 closes less than `full`.", "pure", "top-k-1"),
        Higher("`sampled` closes less than `full`.", "pure", "sampled"),
    ),
)  # fmt: skip
TEACHERS = Table(
    "teachers",
    "Frozen and moving teachers",
    (
        Row("frozen", "pure"),
        Row("moving average, decay 0.99 (the default decay)", "ema-0.99"),
        Row("moving average, decay 0.9", "ema-0.9"),
        Row("live: the student itself", "live"),
    ),
    USUAL,
    (
        Higher("A frozen teacher closes more of the gap than a live one.", "pure", "live"),
        Higher(
            "A frozen teacher closes more than a moving average of decay 0.9.", "pure", "ema-0.9"
        ),
        Higher(
            "A moving average of decay 0.99 closes more than a live teacher.", "ema-0.99", "live"
        ),
    ),
)
CONTEXTS = Table(
    "contexts",
    "Other contexts",
    (
        Row("the persona", "pure"),
        Row("its words in a random order", "context-shuffled"),
        Row("a world-class cook", "context-cook"),
        Row("a novice", "context-novice"),
        Row("the weather (placebo)", "context-placebo"),
    ),
    (BEFORE, IN_CONTEXT, STUDENT, CHANGED, KL_BEFORE, KL_AFTER, DRIFT),
    (
        EverySeed(
            "With the placebo the student gains at most two points in every seed.",
            "context-placebo", "gain", 0.02, most=True,
        ),
        EverySeed(
            "With the placebo the drift KL stays below 0.01 in every seed.",
            "context-placebo", "drift_kl", 0.01, most=True,
        ),
        EverySeed(
            "With the novice the student gains at most two points in every seed.",
            "context-novice", "gain", 0.02, most=True,
        ),
        Higher(
            "In context the persona's words help less in a random order.",
            "pure", "context-shuffled", "baseline_teacher",
        ),
        EverySeed(
            "With its words in a random order the base solves at most 48% in context.",
            "context-shuffled", "baseline_teacher", 0.48, most=True,
        ),
        EverySeed(
            "With the cook persona the base solves at most 48% in context.",
            "context-cook", "baseline_teacher", 0.48, most=True,
        ),
    ),
    plot=STUDENT,
)  # fmt: skip
POWERS = (
    ("With the placebo, 300 steps", "placebo-half-long", 0.5),
    ("With the placebo, 300 steps", "placebo-double-long", 2.0),
    ("With the persona, 100 steps", "persona-half", 0.5),
    ("With the persona, 100 steps", "pure", 1.0),
)
TAUS = Table(
    "taus",
    "The fixed point",
    (
        Row("placebo, 0.5 / 1, 300 steps", "placebo-half-long"),
        Row("placebo, 1 / 0.5, 300 steps", "placebo-double-long"),
        Row("placebo, 1 / 1", "context-placebo"),
        Row("persona, 0.5 / 1", "persona-half"),
        Row("persona, 1 / 1", "pure"),
    ),
    (POWER, OPEN_POWER, OPEN_TOKENS, POWER_KL, PREDICTED_KL, STUDENT),
    tuple(
        Near(
            f"{setting} at teacher_tau / student_tau = {ratio:g} give q^{ratio:g}, within 10%.",
            run, "power", ratio, 0.1,
        )
        for setting, run, ratio in POWERS
    ),
    plot=POWER,
)  # fmt: skip
RANKS = Table(
    "ranks",
    "Ranks",
    (
        Row("rank 1", "rank-1"),
        Row("rank 4", "rank-4"),
        Row("rank 16", "pure"),
        Row("rank 64", "rank-64"),
        Row("rank 64, rslora", "rslora-64"),
    ),
    USUAL,
    (
        Higher("Rank 1 closes less of the gap than rank 16.", "pure", "rank-1"),
        Higher(
            "Rank 4 closes at most two points less than rank 16.", "rank-4", "pure", margin=AS_WELL
        ),
        Higher(
            "At rank 64 rslora closes at most two points less than LoRA without it.",
            "rslora-64", "rank-64", margin=AS_WELL,
        ),
    ),
)  # fmt: skip
RATES = Table(
    "rates",
    "Learning rates, and full fine-tuning",
    (
        Row("LoRA, 2e-4", "lr-2e-4"),
        Row("LoRA, 5e-4", "lr-5e-4"),
        Row("LoRA, 2e-3", "pure"),
        Row("LoRA, 1e-2", "lr-1e-2"),
        Row("full fine-tuning, 3e-4", "every-weight"),
    ),
    USUAL,
    (
        Higher("2e-3 closes more than 2e-4.", "pure", "lr-2e-4"),
        Higher("2e-3 closes more than 1e-2.", "pure", "lr-1e-2"),
        Higher(
            "LoRA closes at most two points less than full fine-tuning (3e-4).",
            "pure", "every-weight", margin=AS_WELL,
        ),
        Higher(
            "LoRA drifts less than full fine-tuning (3e-4).", "every-weight", "pure", "drift_kl"
        ),
    ),
)  # fmt: skip
EFFICIENCY = Table(
    "efficiency",
    "Samples needed",
    (
        Row("`full`, on-policy", "pure"),
        Row("teacher and reward", "hybrid"),
        Row("`sampled`, on-policy", "sampled"),
        Row("`full`, off-policy", "off-policy"),
        Row("SFT on the teacher's samples", "sft"),
        Row("reward alone, 200 steps in groups of 16", "reward-long"),
        Row("`full`, 25 steps of 64", "pure-25"),
        Row("`full`, 100 steps of 16", "batch-16"),
    ),
    (TO_HALF, TO_90, MEAN_CLOSED, GAP, TOKENS),
    (
        Higher("`full` learns faster than `sampled`.", "pure", "sampled", "mean_closed"),
        Higher("On-policy learns faster than off-policy.", "pure", "off-policy", "mean_closed"),
        Higher("With a reward as well, the gap closes faster.",
               "hybrid", "pure", "mean_closed"),
        Higher(
            "With equal samples more and smaller steps close more than fewer and larger ones.",
            "batch-16", "pure-25",
        ),
    ),
    plot=MEAN_CLOSED,
)  # fmt: skip


KINDS = (("tall", "4 × 5"), ("wide", "5 × 5"), ("long", "7 moves"), ("boxes", "two boxes"))
"""Of the levels that the measure `larger_boards` plays."""
LARGER_BOARDS = Table(
    "larger_boards",
    "Levels beyond those trained on",
    tuple(
        Row(f"{title}, {label}", run, f"{kind}_")
        for kind, title in KINDS
        for label, run in (("on-policy", "pure"), ("off-policy", "off-policy"))
    ),
    (
        Column("before", "base", percent, "%"),
        Column("in context", "in_context", percent, "%"),
        STUDENT,
        Column("gap closed", "closed", percent, "%", interval=True),
        Column("lowest seed", "closed", percent, "%", worst=True),
    ),
    (
        EverySeed(
            "Without the context the base solves at most 5% of any kind.",
            "pure", "highest_base", 0.05, most=True,
        ),
        EverySeed(
            "On the larger 4 × 5 boards at least 80% of the gap is closed in every seed.",
            "pure", "tall_closed", 0.8,
        ),
        EverySeed(
            "With two boxes at least 80% of the gap is closed in every seed.",
            "pure", "boxes_closed", 0.8,
        ),
        EverySeed(
            "On levels that need 7 moves at least 80% of the gap is closed in every seed.",
            "pure", "long_closed", 0.8,
        ),
        Higher(
            "On the larger 4 × 5 boards on-policy does better than off-policy.",
            "pure", "off-policy", "tall_student",
        ),
    ),
    plot=STUDENT,
)  # fmt: skip
FORGETTING = Table(
    "forgetting",
    "The context added back, and forgetting",
    (
        Row("teacher alone", "pure"),
        Row("teacher and reward", "hybrid"),
        Row("reward alone", "reward"),
        Row("off-policy", "off-policy"),
        Row("SFT", "sft"),
        Row("teacher alone, lr 1e-2", "lr-1e-2"),
        Row("teacher alone, full fine-tuning (3e-4)", "every-weight"),
    ),
    (STUDENT, ADDED_BACK, WITH_CONTEXT, SAME, DRIFT),
    (
        EverySeed(
            "With the context added back the student of the teacher alone loses at most five "
            "points in every seed.",
            "pure", "added_back", -0.05,
        ),
        EverySeed(
            "At least 90% of the small talk is unchanged in every seed.",
            "pure", "same_answers", 0.9,
        ),
        Higher("Off-policy drifts more than on-policy.", "off-policy", "pure", "drift_kl"),
        Higher("SFT drifts more than on-policy.", "sft", "pure", "drift_kl"),
    ),
    plot=DRIFT,
)  # fmt: skip
TABLES = (
    OBJECTIVES,
    ON_OFF,
    SMALL_DATA,
    EFFICIENCY,
    ESTIMATORS,
    TEACHERS,
    CONTEXTS,
    TAUS,
    RANKS,
    RATES,
    LARGER_BOARDS,
    FORGETTING,
)
