"""Rollouts on disk: one line of JSON each, with per-token values in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from minidistill.errors import EXIT_FAILED, UserError
from minidistill.reporting.records import rollout_names
from minidistill.reporting.run_directory import finite
from minidistill.system.files import write_atomic
from minidistill.system.foreign import describe, foreign_code
from minidistill.types import Completion, Rollout, TokenFigures

SCHEMA_VERSION = 1


class TokenTexts:
    """The text of single token ids; each id is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoded: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        for id in set(ids) - self._decoded.keys():
            with foreign_code(partial(_cannot_decode, id)):
                self._decoded[id] = str(self._tokenizer.decode([id]))
        return [self._decoded[id] for id in ids]


def _cannot_decode(id: int, error: BaseException) -> UserError:
    return UserError(
        f"the model's tokenizer cannot decode the token {id}: {describe(error)}",
        where="model.name",
        fix="use the tokenizer that was made for the model",
        exit_code=EXIT_FAILED,
    )


def write_rollouts(
    run_path: Path,
    step: int,
    rollouts: Sequence[Rollout],
    figures: Sequence[TokenFigures],
    texts: TokenTexts,
) -> dict[str, str]:
    """Write `rollouts/step_000012.jsonl` and `.safetensors`. Returns their names and checksums.

    The safetensors file holds flat tensors (N,) with all completions concatenated; those of
    rollout r are at `offsets[r]:offsets[r + 1]`.

    - token_ids: int64
    - student_logprobs, teacher_logprobs, sampler_logprobs, kl: fp32, nats
    - versions: int32, the version of the weights that sampled the token (updates so far)
    """
    lines = [
        json.dumps(_line(step, r, f, texts), ensure_ascii=False) + "\n"
        for r, f in zip(rollouts, figures, strict=True)
    ]
    lengths = torch.tensor([0, *(len(r.completion.token_ids) for r in rollouts)])
    ids = [t for r in rollouts for t in r.completion.token_ids]
    tensors = {
        "token_ids": torch.tensor(ids, dtype=torch.int64),
        "student_logprobs": _joined([f.logp for f in figures]),
        "teacher_logprobs": _joined([f.teacher_logp for f in figures]),
        "sampler_logprobs": torch.tensor([p for r in rollouts for p in r.completion.logprobs]),
        "kl": _joined([f.kl for f in figures]),
        "versions": torch.tensor(
            [v for r in rollouts for v in r.completion.token_versions(r.policy_version)],
            dtype=torch.int32,
        ),
        "offsets": lengths.cumsum(0),
    }
    # a lone surrogate becomes an escape, the one that JSON has for it
    contents = "".join(lines).encode(errors="backslashreplace"), save(tensors)
    sums = {}
    for name, content in zip(rollout_names(step), contents, strict=True):
        write_atomic(run_path / name, content)
        sums[name] = sha256(content).hexdigest()
    return sums


def _joined(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """All rollouts' values in a row, fp32; empty without rollouts."""
    return torch.cat([torch.empty(0), *columns])


def _line(step: int, rollout: Rollout, figures: TokenFigures, texts: TokenTexts) -> dict[str, Any]:
    prompt, completion, reward = rollout.prompt, rollout.completion, rollout.reward
    gaps = (figures.logp.double() - figures.teacher_logp.double()).tolist()
    return {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "policy_version": rollout.policy_version,
        "env": prompt.env,
        "split": "train",
        "task_id": prompt.task.id,
        "sample": rollout.sample,
        "messages": [dict(m) for m in prompt.task.messages],
        "prompt_text": prompt.student_text,
        "teacher_prompt_text": prompt.teacher_text,
        "context": prompt.context.name,
        "completion": rollout.text,
        "reward": None if reward is None else reward.value,
        "reward_metrics": {}
        if reward is None
        else {k: finite(v) for k, v in reward.metrics.items()},
        "advantage": rollout.advantage,
        "stop": completion.stop,
        "truncated": completion.truncated,
        "mean_logprob_gap": finite(sum(gaps) / len(gaps)),
        "worst_logprob_gap": finite(max(gaps)),
        "tokens": texts(completion.token_ids),
        **(_conversation(rollout, texts) if rollout.first else {}),
    }


def with_inserted(
    completion: Completion, texts: TokenTexts, kl: Sequence[float]
) -> tuple[tuple[str, ...], tuple[float | None, ...]]:
    """The text and the KL of each token, with what an environment wrote, which has no KL."""
    values: list[float | None] = [*kl]
    for each in reversed(completion.inserted):
        values[each.at : each.at] = [None] * len(each.ids)
    return tuple(texts(completion.sequence)), tuple(values)


def _conversation(rollout: Rollout, texts: TokenTexts) -> dict[str, Any]:
    """Which sample of its conversation a rollout is, and what the environment wrote in it.

    `at` is the number of sampled tokens before the inserted ones.
    """
    return {
        "part": rollout.part,
        "inserted": [
            {"at": each.at, "ids": list(each.ids), "text": "".join(texts(each.ids))}
            for each in rollout.completion.inserted
        ],
    }
