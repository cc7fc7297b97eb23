"""The command line of a suitable server, and a check that it serves the trainer's model."""

from __future__ import annotations

import torch

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.vllm.options import adapter_options
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.placement.placement import EnginePlacement
from minidistill.trainer.policy import Policy
from minidistill.types import Request, Role, SamplingParams

TOKENS = 16
# Mean difference (nats) over the probe's tokens. Other models' log-probs differ by whole nats.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3}


def server_command(config: Config, engine: EnginePlacement, *, teacher: bool) -> str:
    """The command line that starts a suitable server."""
    adapters = adapter_options(config, engine.model_config, teacher=teacher)
    words = ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"] if adapters else []
    words += [
        "vllm serve",
        engine.model,
        f"--max-model-len {engine.max_length}",
        "--generation-config vllm",
        "--logprobs-mode processed_logprobs",
    ]
    if adapters:
        words += ["--enable-lora", f"--max-lora-rank {adapters['max_lora_rank']}"]
        # with async, requests in flight finish with the previous version
        is_async = config.schedule == "async"
        words += [f"--max-loras {adapters['max_loras'] + is_async}"]
        words += ["--lora-target-modules", *adapters["lora_target_modules"]]
    return " ".join(words)


def check_same_model(
    engine: Engine,
    policy: Policy,
    trainer: Engine,
    temperature: float | None,
    where: str,
    command: str,
) -> None:
    """Compare the server's log-probs with the `trainer`'s before training.

    Raises UserError (exit code 3) if the server has another model, or if its sampled log-probs are
    not those of the distribution at this `temperature` (None: nothing will be sampled).
    """
    size = policy.head_VH.shape[0]
    ids = [(7919 * (i + 1)) % min(size, len(policy.tokenizer)) for i in range(2 * TOKENS)]
    prompt, completion = tuple(ids[:TOKENS]), tuple(ids[TOKENS:])
    tolerance = TOLERANCE[policy.dtype]

    def expected(token_ids: tuple[int, ...], temperature: float) -> list[float]:
        # without an adapter the student's weights before training are the base's
        role = Role.BASE if policy.lora else Role.STUDENT
        return trainer.score([prompt], [token_ids], role, temperature)[0]

    (scored,) = engine.score([prompt], [completion], Role.TEACHER)
    difference = _mean_difference(scored, expected(completion, 1.0))
    if not difference <= tolerance:
        raise UserError(
            f"the {engine.description} serves another model: log-probs of {len(completion)} tokens "
            f"differ from the trainer's by {difference:.3g} nats on average (rounding explains at "
            f"most {tolerance:g})",
            where=where,
            fix=f"start it with\n{command}",
            exit_code=EXIT_ENVIRONMENT,
        )
    if temperature is None:
        return
    (sampled,) = engine.generate(
        [Request(prompt, 0)], SamplingParams(TOKENS, temperature), Role.TEACHER
    )
    difference = _mean_difference(
        list(sampled.logprobs), expected(sampled.token_ids, temperature or 1.0)
    )
    if not difference <= tolerance:
        raise UserError(
            f"the {engine.description} reports log-probs of another distribution than it samples "
            f"from at temperature {temperature:g}: they differ by {difference:.3g} nats on average",
            where=where,
            fix="start it with --logprobs-mode processed_logprobs:\n" + command,
            exit_code=EXIT_ENVIRONMENT,
        )


def _mean_difference(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
