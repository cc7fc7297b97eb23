"""The built-in Sokoban as an environment of verifiers: the same prompts, rewards and metrics."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset

from minidistill.envs.sokoban import load


def load_environment(**args: Any) -> Any:
    """`args` are those of `sokoban-env`."""
    environment = load(**args)
    tasks = {task.id: task for split in (environment.train, environment.eval) for task in split}

    def score(completion: Any, info: dict[str, str]) -> Any:
        return environment.score(tasks[info["id"]], completion[-1]["content"])

    def reward(completion: Any, info: dict[str, str]) -> float:
        return score(completion, info).value

    def solved(completion: Any, info: dict[str, str]) -> float:
        return score(completion, info).metrics["solved"]

    def rows(split: Any) -> Dataset:
        return Dataset.from_list(
            [
                {"prompt": [dict(m) for m in task.messages], "info": {"id": task.id}}
                for task in split
            ]
        )

    return vf.SingleTurnEnv(
        dataset=rows(environment.train),
        eval_dataset=rows(environment.eval),
        rubric=vf.Rubric(funcs=[reward, solved], weights=[1.0, 0.0]),
    )
