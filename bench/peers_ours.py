"""minidistill's side of `bench.peers`: a process that takes a step when it is told to.

    python -m bench.peers_ours FOLDER    # with the case in FOLDER/case.json

The first step is the one that the peer repeats: its prompts, its completions and the adapter that
sampled them are written to the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.our_step import OurRun, Step, open_run, peak_rss
from bench.pair import change_adapter
from bench.workload import Case

ADAPTER, FIRST = "adapter", "first_step.json"


def main(folder: Path) -> None:
    case = Case(**json.loads((folder / "case.json").read_text()))
    with open_run(case, folder) as run:
        torch.manual_seed(0)
        change_adapter(run.session.policy)  # a new one is the base: the teacher would not differ
        run.session.policy.model.save_pretrained(folder / ADAPTER)
        first = run.step()
        write_first_step(run, first, folder)
        answer(figures(first) | {"ready": True})
        for line in sys.stdin:
            if line.strip() == "end":
                break
            answer(figures(run.step()))


def write_first_step(run: OurRun, first: Step, folder: Path) -> None:
    """What the peer needs to repeat the step."""
    context = run.session.config.orchestrator.teacher_model.context
    texts = [
        {
            "prompt": list(map(dict, rollout.prompt.task.messages)),
            "student_ids": rollout.prompt.student_ids,
            "teacher_ids": rollout.prompt.teacher_ids,
            "completion_ids": rollout.completion.token_ids,
        }
        for rollout in first.rollouts
    ]
    (folder / FIRST).write_text(json.dumps({"context": context, "rollouts": texts}))


def figures(step: Step) -> dict[str, Any]:
    return {
        "seconds": step.seconds,
        "cpu_seconds": step.cpu_seconds,
        "loss": step.metrics["loss/total"],
        "grad_norm": step.metrics["optim/grad_norm"],
        "peak_bytes": peak_rss(),
        "sample": step.metrics["time/sample"],
        "train": step.metrics["time/train"],
    }


def answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
