"""An environment whose rewards are all the same."""

from __future__ import annotations

from minidistill.types import Reward, Task
from support.side_channels import Meddling


class _Equal(Meddling):
    def score(self, task: Task, completion: str) -> Reward:
        return Reward(0.1)  # whose mean over a group of three is rounded


def load(**args: object) -> Meddling:
    return _Equal(args)
