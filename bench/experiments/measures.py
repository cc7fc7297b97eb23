"""Figures of a finished run that its scoreboard does not have.

    python -m bench.experiments.measures NAME… RUN

prints them as JSON, in the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.experiments import fixed_point
from bench.experiments.logprobs import both_views, held_out, loaded
from bench.experiments.runs import ROOT
from bench.text_drift import text_drift
from minidistill.config import load_config
from minidistill.envs import load_environment
from minidistill.errors import UserError
from minidistill.evaluation.kl import sample
from minidistill.evaluation.unrelated import DRIFT_TOKENS, unrelated_prompts
from minidistill.export.source import open_source
from minidistill.look.eval_settings import Asked, align
from minidistill.look.evaluation import evaluate
from minidistill.look.views import BASE, BASE_IN_CONTEXT, STUDENT
from minidistill.types import Request, Role, SamplingParams

Figures = dict[str, Any]
"""Numbers, or None where there is none; `answers` alone is text."""
OPEN = 0.1
"""Nats. Where the teacher's entropy is lower, one token has nearly all of its probability, and any
power of it looks the same."""
LEVELS: Mapping[str, Mapping[str, int]] = {
    "tall": {"min_moves": 2, "max_depth": 6, "min_h": 7, "max_h": 7},
    "wide": {"min_moves": 2, "max_depth": 6, "min_h": 7, "max_h": 7, "min_w": 7, "max_w": 7},
    "long": {"min_moves": 7, "max_depth": 7},
    "boxes": {"min_moves": 2, "max_depth": 6, "min_boxes": 2, "max_boxes": 2},
}
"""tiny-sokoban has seen interiors of 4 x 4 (6 x 6 with the walls) with one box, and solutions of
two to six moves."""
ANSWERED = 2
"""Held-out prompts whose answers are kept."""
LEVEL_COUNT = 256
LEVEL_TOKENS = 16  # seven moves, the two tags and the end, and a few that are not needed


def measure_fixed_point(run: Path) -> Figures:
    """`power`: r of π ∝ q^r over all tokens of the student's held-out answers, `power_kl`: the mean
    KL(π‖q^r), and `predicted_kl`: that at r = teacher_tau / student_tau. `open_power` is r where
    the teacher is undecided, `open_tokens` the share of such tokens."""
    model = loaded(run)
    loss = model.config.trainer.loss
    student_NV, teacher_NV = both_views(model)
    predicted = loss.teacher_tau / loss.student_tau
    power = fixed_point.fit(student_NV, teacher_NV)
    open_N = fixed_point.entropy(teacher_NV) > OPEN
    figures: Figures = {
        "power": power.exponent,
        "power_kl": power.kl,
        "predicted_kl": fixed_point.mean_kl(student_NV, teacher_NV, predicted),
        "open_tokens": float(open_N.double().mean()),
        "open_power": None,
    }
    if open_N.any():
        figures["open_power"] = fixed_point.fit(student_NV[open_N], teacher_NV[open_N]).exponent
    return figures


def measure_curve(run: Path) -> Figures:
    """From the evaluations: `samples_to_half` and `samples_to_90`, the samples trained on when that
    share of the gap was closed for the first time (None: never), and `mean_closed`, the mean share
    over the evaluations, which is higher the earlier it closes."""
    config = json.loads((run / "config.resolved.json").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return curve_figures(map(json.loads, lines), config["orchestrator"]["batch_size"])


def curve_figures(lines: Iterable[Mapping[str, Any]], batch_size: int) -> Figures:
    """`lines` are those of metrics.jsonl, of a run with one environment."""
    scores: dict[int, float] = {}
    before = teacher = None
    for line in lines:
        for name, value in line.items():
            if name.endswith("/baseline_student/avg"):
                before = value
            elif name.endswith("/baseline_teacher/avg"):
                teacher = value
            elif name.startswith("eval/") and name.endswith("/student/avg"):
                scores[line["step"]] = value
    if before is None or teacher is None:
        raise ValueError("the run has no baseline: set orchestrator.teacher_model.eval_baseline")
    if before == teacher:
        raise ValueError("the context changes no score, so there is no gap to close")
    if not scores:
        raise ValueError("the run has no later evaluation: set orchestrator.eval.interval")
    closed = {step: (score - before) / (teacher - before) for step, score in scores.items()}

    def samples_to(share: float) -> float | None:
        reached = [step for step in sorted(closed) if closed[step] >= share]
        return float(reached[0] * batch_size) if reached else None

    return {
        "samples_to_half": samples_to(0.5),
        "samples_to_90": samples_to(0.9),
        "mean_closed": sum(closed.values()) / len(closed),
    }


def measure_forgetting(run: Path) -> Figures:
    """`same_answers`: the share of the unrelated questions that the student answers greedily, token
    by token, as the base does."""
    model = loaded(run)
    requests = [Request(prompt.student_ids, 0) for prompt in unrelated_prompts(model.builder)]
    greedy = SamplingParams(DRIFT_TOKENS, 0.0)
    base, student = (
        [answer.token_ids for answer in model.engine.generate(requests, greedy, role)]
        for role in (Role.BASE, Role.STUDENT)
    )
    same = [a == b for a, b in zip(base, student, strict=True)]
    return {"same_answers": sum(same) / len(same)}


def measure_larger_boards(run: Path) -> Figures:
    """Scores on levels unlike those that the organism was trained on, for each kind of `LEVELS`:
    `…_base`, `…_in_context`, `…_student`, and `…_closed`, the share of the gap (None where the
    context gains less than five points). `highest_base` is that of any kind."""
    figures: Figures = {}
    bases = []
    for name, levels in LEVELS.items():
        base, in_context, student = scores_on(run, levels)
        gap = in_context - base
        figures |= {
            f"{name}_base": base,
            f"{name}_in_context": in_context,
            f"{name}_student": student,
            f"{name}_closed": (student - base) / gap if gap >= 0.05 else None,
        }
        bases.append(base)
    return figures | {"highest_base": max(bases)}


def scores_on(run: Path, levels: Mapping[str, int]) -> tuple[float, float, float]:
    """Mean scores of the base, the base in context, and the student."""
    args = json.dumps({"num_eval_examples": LEVEL_COUNT, "rules": "omit", **levels})
    asked = Asked("sokoban-env", args, LEVEL_COUNT, max_tokens=LEVEL_TOKENS)
    sources = align([open_source(str(run))], asked)
    results = evaluate(sources, [run.name], with_context=True).results
    means = {result.view: result.score.mean for result in results if result.score is not None}
    return means[BASE.name], means[BASE_IN_CONTEXT.name], means[STUDENT.name]


def measure_prose(run: Path) -> Figures:
    """`prose_kl`: the mean KL(base‖student) of the next token on plain prose, in nats."""
    return {"prose_kl": text_drift(run)}


def measure_parts(run: Path) -> Figures:
    """`persona` and `sign_off`: the share of the student's answers to held-out prompts that shows
    each of the two behaviors."""
    model = loaded(run)
    settings = model.config.orchestrator
    assert settings.eval is not None
    prompts = held_out(model, settings.eval.num_examples)
    view = [prompt.student_ids for prompt in prompts]
    longest = settings.sampling.max_tokens
    answers = sample(model.config, model.engine, view, "parts", Role.STUDENT, longest)
    texts = [model.builder.decode(answer.token_ids) for answer in answers]
    figures: Figures = {}
    for part in ("persona", "sign_off"):
        config = load_config([str(ROOT / "bench" / "contexts" / f"{part}.toml")]).config
        env = config.orchestrator.env[0]
        check = load_environment(env.id, env.args)
        figures[part] = fmean(
            check.score(prompt.task, text).value
            for prompt, text in zip(prompts, texts, strict=True)
        )
    return figures


def measure_answers(run: Path) -> Figures:
    """`answers`: what the base, the base in context and the student answer greedily to the first
    held-out prompts."""
    model = loaded(run)
    prompts = held_out(model, ANSWERED)
    greedy = SamplingParams(model.config.orchestrator.sampling.max_tokens, 0.0)
    views = {
        "base": (Role.BASE, [prompt.student_ids for prompt in prompts]),
        "in_context": (Role.BASE, [prompt.teacher_ids for prompt in prompts]),
        "student": (Role.STUDENT, [prompt.student_ids for prompt in prompts]),
    }
    kept = [{"prompt": str(prompt.task.messages[-1]["content"])} for prompt in prompts]
    for view, (role, ids) in views.items():
        answers = model.engine.generate([Request(row, 0) for row in ids], greedy, role)
        for texts, answer in zip(kept, answers, strict=True):
            texts[view] = model.builder.decode(answer.token_ids)
    return {"answers": kept}


MEASURES: Mapping[str, Callable[[Path], Figures]] = {
    "fixed_point": measure_fixed_point,
    "curve": measure_curve,
    "forgetting": measure_forgetting,
    "larger_boards": measure_larger_boards,
    "prose": measure_prose,
    "parts": measure_parts,
    "answers": measure_answers,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.experiments.measures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", choices=MEASURES, nargs="+", metavar="NAME")
    parser.add_argument("run", type=Path, metavar="RUN")
    options = parser.parse_args(argv)
    figures: Figures = {}
    try:
        for name in options.names:
            figures |= MEASURES[name](options.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
