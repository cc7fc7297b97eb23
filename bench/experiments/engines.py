"""The same runs sampled by the trainer's own model and by vLLM, with the `sampled` estimator."""

from __future__ import annotations

from collections.abc import Iterator

from bench.experiments.claims import Alike, Claim
from bench.experiments.runs import Run
from bench.experiments.smollm2 import MODEL
from bench.experiments.tables import (
    BEFORE,
    DRIFT,
    GAP,
    IN_CONTEXT,
    KL_AFTER,
    KL_CLOSED,
    STUDENT,
    Column,
    Experiment,
    Row,
    Table,
)

SAMPLED = ("--trainer.loss.estimator", "sampled")
SHORT = ("--max_steps", "14", "--orchestrator.eval.num_examples", "32")
ENGINES = {"embedded": "the trainer's model", "vllm": "vLLM"}
SUBJECTS = {
    "sokoban": ("Sokoban", "configs/sokoban.toml", "@", "configs/overlays/pure.toml"),
    "persona": ("persona", "bench/contexts/persona.toml"),
    "brevity": ("brevity", "bench/contexts/brevity.toml"),
    "json": ("format", "bench/contexts/json.toml"),
    "topics": ("classification", "bench/contexts/topics.toml"),
}


def runs() -> Iterator[Run]:
    for subject, (_, *config) in SUBJECTS.items():
        real = subject != "sokoban"
        flags = ("--model.name", "{model}", *SHORT) if real else ()
        for engine in ENGINES:
            arguments = (*config, *flags, *SAMPLED, "--inference.engine", engine)
            yield Run(f"{subject}-{engine}", arguments, model=MODEL if real else None)


def claims() -> Iterator[Claim]:
    for subject, (title, *_) in SUBJECTS.items():
        yield Alike(
            f"{title.capitalize()}: the shares of the held-out KL closed differ by at most ten "
            "points.",
            f"{subject}-vllm", f"{subject}-embedded", "heldout_kl_closed", 0.1,
        )  # fmt: skip


MISMATCH = Column("highest sampler mismatch", "sampler_mismatch", "{:.0e}".format)
COLUMNS = (BEFORE, IN_CONTEXT, STUDENT, GAP, KL_AFTER, KL_CLOSED, DRIFT, MISMATCH)
ROWS = tuple(
    Row(f"{title}, {name}", f"{subject}-{engine}")
    for subject, (title, *_) in SUBJECTS.items()
    for engine, name in ENGINES.items()
)
TABLE = Table("engines", "Two engines", ROWS, COLUMNS, tuple(claims()), KL_CLOSED)
ENGINES_AGREE = Experiment("engines", tuple(runs()), (TABLE,), seeds=1)
