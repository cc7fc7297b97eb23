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
PERSONA = Column("persona", "persona", percent, " %", interval=True)
SIGN_OFF = Column("sign-off", "sign_off", percent, " %", interval=True)
NAMES = {
    "persona": "persona: a pirate's answers begin with “Ahoy!”",
    "brevity": "brevity: one line of at most 12 words",
    "json": "format: a JSON object with one key",
    "topics": "classification: one of four topics",
    "topics_and_elsewhere": "classification, half of each step on other prompts",
    "sign_off": "sign-off: answers end with “Stay safe!”",
}
TASKS = ("topics", "topics_and_elsewhere")
"""Contexts for a task, which should leave all other prompts alone."""
LENGTHS = (50, 200, 500, 1000, 1500)


def bake(name: str, context: str, *flags: str, measures: tuple[str, ...] = ("prose",)) -> Run:
    config = f"bench/contexts/{context}.toml"
    return Run(name, (config, "--model.name", "{model}", *flags), measures, model=MODEL)


FIRST = (
    *("run", "bench/contexts/persona.toml", "--model.name", "{model}"),
    *("--output_dir", "{scratch}/first"),
    *("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline"),
)
MERGE = ("export", "{scratch}/first", "--to", "{scratch}/merged", "--merge", "--no-vllm")
SIGN_OFF_CONFIG = "bench/contexts/sign_off.toml"
SECOND = {
    "merged": ((FIRST, MERGE), ("--model.name", "{scratch}/merged")),
    "continued": (
        (FIRST,),
        ("--model.name", "{model}", "--trainer.model.lora.init", "{scratch}/first"),
    ),
}


def after(name: str) -> Run:
    """The sign-off baked after the persona."""
    first, flags = SECOND[name]
    return Run(f"then-{name}", (SIGN_OFF_CONFIG, *flags), ("prose", "parts"), first, MODEL)


RUNS = (
    *(bake(name, name) for name in NAMES if name not in ("persona", "sign_off")),
    bake("persona", "persona", measures=("prose", "parts")),
    bake("sign_off", "sign_off", measures=("prose", "parts")),
    bake("both", "both", measures=("prose", "parts")),
    after("merged"),
    after("continued"),
    *(bake(f"persona-{length}", f"persona_{length}") for length in LENGTHS),
)


def claims() -> tuple[Claim, ...]:
    out: list[Claim] = []
    for name in NAMES:
        out += [
            EverySeed(
                f"`{name}`: at least 80 % of the gap in every seed.", name, "gap_closed", 0.8
            ),
            EverySeed(
                f"`{name}`: the lower end of each seed's interval is at least 60 %.",
                name, "gap_closed_low", 0.6,
            ),
            EverySeed(
                f"`{name}`: at least 70 % of the held-out KL in every seed.",
                name, "heldout_kl_closed", 0.7,
            ),
        ]  # fmt: skip
    for name in TASKS:
        out.append(
            EverySeed(
                f"`{name}`: the drift KL is under a tenth of the KL that was distilled.",
                name, "drift_share", 0.1, most=True,
            )
        )  # fmt: skip
    return tuple(out)


TABLES = (
    Table(
        "smollm2_contexts",
        "Contexts for a real model",
        tuple(Row(label, name) for name, label in NAMES.items()),
        (
            BEFORE, IN_CONTEXT, STUDENT, GAP, WORST_GAP, KL_BEFORE, KL_AFTER, KL_CLOSED, DRIFT,
            PROSE, LENGTH_BEFORE, LENGTH,
        ),
        claims(),
    ),
    Table(
        "smollm2_two",
        "Two contexts",
        (
            Row("persona alone", "persona"),
            Row("sign-off alone", "sign_off"),
            Row("both in one context", "both"),
            Row("sign-off after the persona was merged", "then-merged"),
            Row("sign-off, the persona's adapter trained on", "then-continued"),
        ),
        (PERSONA, SIGN_OFF, KL_CLOSED, DRIFT, PROSE),
        (
            Higher(
                "Merged before the second bake, the persona shows more often than when its adapter "
                "is trained on.",
                "then-merged", "then-continued", "persona",
            ),
            EverySeed(
                "In one context both are learned: the persona in at least half of the answers.",
                "both", "persona", 0.5,
            ),
            EverySeed(
                "In one context both are learned: the sign-off in at least half of the answers.",
                "both", "sign_off", 0.5,
            ),
        ),
        plot=PERSONA,
    ),
    Table(
        "smollm2_lengths",
        "Contexts of 50 to 1,500 tokens",
        tuple(Row(f"about {length:,} tokens", f"persona-{length}") for length in LENGTHS),
        (BEFORE, IN_CONTEXT, STUDENT, GAP, KL_BEFORE, KL_AFTER, KL_CLOSED, DRIFT, PROSE),
        (
            Higher(
                "1,500 tokens close as much of the KL as 200, within five points.",
                "persona-1500", "persona-200", "heldout_kl_closed", margin=-0.05,
            ),
            Higher("The student of 1,500 tokens is better than that of 50.",
                   "persona-1500", "persona-50", "student"),
        ),
        plot=STUDENT,
    ),
)  # fmt: skip
SMOLLM2 = Experiment("smollm2", RUNS, TABLES, SEEDS)
