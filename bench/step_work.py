"""The arithmetic and the memory traffic that a step needs, if no token is computed twice.

Multiplications and additions count as two operations. Norms, activations and rotations are left
out. Under LoRA, with P parameters in the layers, A in the adapter, D in the head, and W = 4 times
the width of all layers' queries:

    score     2 P a token, 2 D a completion token, W for each pair of a query and a key
    forward   2 (P + A) a token, and W a pair
    loss      4 D a completion token: the student's logits, and the gradient of their input
    backward  (2 P + 4 A) a token, because the base is frozen; 2 W a pair

The tokens are those that a step cannot do without: what all its prompts begin with once, each
distinct prompt once, and each completion without its last token. The teacher's common beginning is
read once a run, and its keys are still attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minidistill.placement.model_shape import ModelShape
from minidistill.trainer.shared_row import common_prefix
from minidistill.types import Rollout

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one view of a step's prompts."""

    tokens: int
    """Computed in the step."""
    pairs: int
    """Of one of them and each token that it attends to."""
    keys: int
    """Tokens of all rows in the middle of sampling, prompts that several rows read once."""

    @classmethod
    def of(cls, prompts: Sequence[Ids], completions: Sequence[Ids], cached: int = 0) -> Tokens:
        """`cached` tokens at the beginning of all prompts are there already."""
        distinct = sorted(set(prompts))
        common = len(common_prefix(distinct)) if len(distinct) > 1 else cached
        first = max(common, cached)
        spans = [(cached, first), *((first, len(prompt)) for prompt in distinct)]
        spans += [
            (len(prompt), len(prompt) + len(completion) - 1)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        tokens = sum(stop - start for start, stop in spans)
        pairs = sum((stop * (stop + 1) - start * (start + 1)) // 2 for start, stop in spans)
        shared = common + sum(len(prompt) - common for prompt in distinct)
        return cls(tokens, pairs, shared + sum(map(len, completions)) // 2)


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step."""

    flops: dict[str, float]
    """Of each piece of the training phase."""
    decode_bytes: float
    """That sampling reads after the first token: for each token of the longest completion, the
    weights, and the keys and values of all rows."""

    @property
    def training(self) -> float:
        return sum(self.flops.values())


def step_work(
    shape: ModelShape, adapter: int, rollouts: Sequence[Rollout], context: Ids, itemsize: int = 4
) -> Work:
    """`adapter` parameters are trained. All teacher prompts of the run begin with `context`."""
    completions = [r.completion.token_ids for r in rollouts]
    student = Tokens.of([r.prompt.student_ids for r in rollouts], completions)
    teacher = Tokens.of([r.prompt.teacher_ids for r in rollouts], completions, len(context))
    sampled = sum(map(len, completions))
    head = shape.vocab * shape.hidden
    pair = 4 * shape.attention * shape.layers
    flops = {
        "score": 2 * shape.body * teacher.tokens + 2 * head * sampled + pair * teacher.pairs,
        "forward": 2 * (shape.body + adapter) * student.tokens + pair * student.pairs,
        "loss": 4 * head * sampled,
        "backward": (2 * shape.body + 4 * adapter) * student.tokens + 2 * pair * student.pairs,
    }
    steps = max(map(len, completions)) - 1
    weights = (shape.body + head + adapter) * itemsize
    keys_values = 2 * shape.keys * shape.layers * student.keys * itemsize
    return Work({k: float(v) for k, v in flops.items()}, steps * float(weights + keys_values))
