"""SmolLM2-135M-Instruct: contexts with a measured gap, several of them, and their length."""

from __future__ import annotations

from bench.experiments.claims import Claim, EverySeed, Higher
from bench.experiments.runs import Run
from bench.experiments.tables import (
    BEFORE,
    DRIFT,
    GAP,
    IN_CONTEXT,
    KL_AFTER,
    KL_BEFORE,
    KL_CLOSED,
    LENGTH,
    LENGTH_BEFORE,
    STUDENT,
    WORST_GAP,
    Column,
    Experiment,
    Row,
    Table,
    percent,
)

MODEL = "smollm2-bf16"
SEEDS = 3
PROSE = Column("drift KL on prose", "prose_kl", interval=True)
PERSONA = Column("persona", "persona", percent, "%", interval=True)
SIGN_OFF = Column("sign-off", "sign_off", percent, "%", interval=True)
NAMES = {
    "persona": ("persona", "a pirate, whose answers begin with “Ahoy!”"),
    "brevity": ("brevity", "one line of at most 12 words"),
    "json": ("format", "a JSON object with one key"),
    "topics": ("classification", "one of four topics"),
    "topics_and_elsewhere": ("classification with other prompts", "6 of the 8 in a step"),
}
"""A title of each run, and what its context asks for."""
TASKS = ("topics", "topics_and_elsewhere")
"""Contexts for a task, which should leave all other prompts alone."""
LENGTHS = (50, 1500)
PROSE_KL = ("prose",)


def bake(
    name: str, context: str, *flags: str, measures: tuple[str, ...] = ("prose", "answers")
) -> Run:
    config = f"bench/contexts/{context}.toml"
    return Run(name, (config, *flags, "--model.name", "{model}"), measures, model=MODEL)


NO_EVALUATION = ("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline")


def first(context: str, *flags: str) -> tuple[str, ...]:
    """A run that only prepares the one that counts."""
    start = ("run", f"bench/contexts/{context}.toml", *flags, "--model.name", "{model}")
    return (*start, "--output_dir", "{scratch}/first", *NO_EVALUATION)


MERGE = ("export", "{scratch}/first", "--to", "{scratch}/merged", "--merge", "--no-vllm")
SFT = ("@", "configs/overlays/sft.toml")
HALF = ("--max_steps", "14")
FROM_FIRST = ("--trainer.model.lora.init", "{scratch}/first")
AFTER = Run(
    "after",
    ("bench/contexts/sign_off.toml", "--model.name", "{scratch}/merged"),
    ("prose", "parts"),
    (first("persona"), MERGE),
    MODEL,
)
"""The sign-off, baked into a model that the persona is merged into."""
SFT_FIRST = Run(
    "json-sft-first",
    ("bench/contexts/json.toml", *HALF, "--model.name", "{model}", *FROM_FIRST),
    PROSE_KL,
    (first("json", *SFT, *HALF),),
    MODEL,
)


RUNS = (
    *(bake(name, name) for name in NAMES if name != "persona"),
    bake("persona", "persona", measures=("prose", "parts", "answers")),
    bake("both", "both", measures=("prose", "parts")),
    AFTER,
    bake("json-sft", "json", *SFT, measures=PROSE_KL),
    SFT_FIRST,
    *(bake(f"persona-{length}", f"persona_{length}", measures=PROSE_KL) for length in LENGTHS),
    bake("persona-lr-5e-4", "persona", "--trainer.optim.lr", "5e-4", measures=PROSE_KL),
)


def claims() -> tuple[Claim, ...]:
    out: list[Claim] = []
    for name, (title, _) in NAMES.items():
        start = title.capitalize()
        out += [
            EverySeed(
                f"{start}: at least 80% of the gap is closed in every seed.",
                name, "gap_closed", 0.8,
            ),
            EverySeed(
                f"{start}: the lower end of each seed's interval is at least 60%.",
                name, "gap_closed_low", 0.6,
            ),
            EverySeed(
                f"{start}: at least 70% of the held-out KL is closed in every seed.",
                name, "heldout_kl_closed", 0.7,
            ),
        ]  # fmt: skip
    for name in TASKS:
        out.append(
            EverySeed(
                f"{NAMES[name][0].capitalize()}: the drift KL is at most a tenth of the KL that "
                "was distilled.",
                name, "drift_share", 0.1, most=True,
            )
        )  # fmt: skip
    return tuple(out)


TABLES = (
    Table(
        "smollm2_contexts",
        "Contexts for a real model",
        tuple(Row(f"{title}: {what}", name) for name, (title, what) in NAMES.items()),
        (
            BEFORE, IN_CONTEXT, STUDENT, GAP, WORST_GAP, KL_BEFORE, KL_AFTER, KL_CLOSED, DRIFT,
            PROSE, LENGTH_BEFORE, LENGTH,
        ),
        claims(),
        answers=True,
    ),
    Table(
        "smollm2_two",
        "Two contexts",
        (
            Row("persona alone", "persona"),
            Row("both in one context", "both"),
            Row("sign-off after the persona was merged", "after"),
        ),
        (PERSONA, SIGN_OFF, KL_CLOSED, DRIFT, PROSE),
        (
            EverySeed(
                "One after the other: at least half of the answers have the persona.",
                "after", "persona", 0.5,
            ),
            EverySeed(
                "One after the other: at least half of the answers have the sign-off.",
                "after", "sign_off", 0.5,
            ),
            EverySeed(
                "In one context: at least half of the answers have the persona.",
                "both", "persona", 0.5,
            ),
            EverySeed(
                "In one context: at least half of the answers have the sign-off.",
                "both", "sign_off", 0.5,
            ),
        ),
        plot=PERSONA,
    ),
    Table(
        "smollm2_format",
        "A format that the student never starts",
        (
            Row("on-policy", "json"),
            Row("SFT on the teacher's samples", "json-sft"),
            Row("14 steps of SFT, then 14 on-policy", "json-sft-first"),
        ),
        (STUDENT, KL_AFTER, DRIFT, PROSE),
        (
            Higher("SFT gives more JSON answers than on-policy.",
                   "json-sft", "json", "student"),
            Higher("SFT first, then on-policy gives more JSON answers than SFT alone.",
                   "json-sft-first", "json-sft", "student"),
            Higher("SFT first, then on-policy leaves a lower held-out KL than SFT alone.",
                   "json-sft", "json-sft-first", "heldout_kl_after"),
        ),
        plot=STUDENT,
    ),
    Table(
        "smollm2_lengths",
        "Contexts of 50 to 1,500 tokens",
        (
            Row("50 tokens: one demonstration", "persona-50"),
            Row("250 tokens: eight", "persona"),
            Row("1,500 tokens: 54", "persona-1500"),
        ),
        (BEFORE, IN_CONTEXT, STUDENT, GAP, WORST_GAP, KL_BEFORE, KL_AFTER, KL_CLOSED, DRIFT, PROSE),
        (
            Higher(
                "1,500 tokens close at most five points less of the KL than 250.",
                "persona-1500", "persona", "heldout_kl_closed", margin=-0.05,
            ),
            Higher("The student of 1,500 tokens scores higher than that of 50.",
                   "persona-1500", "persona-50", "student"),
        ),
        plot=STUDENT,
    ),
    Table(
        "smollm2_rates",
        "Learning rates for a real model",
        (
            Row("persona, 5e-4", "persona-lr-5e-4"),
            Row("persona, 2e-3", "persona"),
        ),
        (STUDENT, GAP, KL_CLOSED, DRIFT, PROSE),
        (
            Higher("2e-3 closes more of the KL than 5e-4.",
                   "persona", "persona-lr-5e-4", "heldout_kl_closed"),
        ),
        plot=KL_CLOSED,
    ),
)  # fmt: skip
SMOLLM2 = Experiment("smollm2", RUNS, TABLES, SEEDS)
