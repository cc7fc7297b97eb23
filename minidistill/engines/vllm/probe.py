"""A few tokens from vLLM before anything is written: whether it runs the model, and as the trainer.

What a model needs of vLLM's kernels shows only when it runs.
"""

from __future__ import annotations

from minidistill.engines.base import Engine
from minidistill.engines.server.probe import TOLERANCE
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.trainer.policy import Policy
from minidistill.types import Request, Role, SamplingParams

PROMPT = tuple(range(2, 10))  # ids that any vocabulary has
TOKENS = 8
FIX = 'use inference.engine = "embedded"'


def check_runs(engine: Engine, policy: Policy, trainer: Engine, temperature: float | None) -> None:
    """Sample with the weights before training, or score if `temperature` is None.

    Raises UserError (exit code 3) if vLLM fails, or if its log-probs are not the `trainer`'s.
    """
    what = f"vLLM cannot run this model on {engine.location}"
    try:
        if temperature is None:
            ids, (logprobs,) = PROMPT, engine.score([PROMPT], [PROMPT], Role.BASE)
        else:
            params = SamplingParams(TOKENS, temperature)
            (completion,) = engine.generate([Request(PROMPT, 0)], params, Role.BASE)
            ids, logprobs = completion.token_ids, list(completion.logprobs)
    except UserError as error:
        if error.exit_code != EXIT_FAILED:
            raise
        raise UserError(f"{what}: {error.what}", error.where, FIX, EXIT_ENVIRONMENT) from error
    # without an adapter the student's weights before training are the base's
    role = Role.BASE if policy.lora else Role.STUDENT
    (expected,) = trainer.score([PROMPT], [ids], role, temperature or 1.0)
    difference = sum(abs(a - b) for a, b in zip(logprobs, expected, strict=True)) / len(ids)
    if not difference <= TOLERANCE[policy.dtype]:
        raise UserError(
            f"{what}: before training its log-probs differ from transformers' by {difference:.2g} "
            "nats on average",
            where="inference.engine",
            fix=FIX,
            exit_code=EXIT_ENVIRONMENT,
        )
