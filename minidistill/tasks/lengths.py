"""Whether context, prompt and completion fit into a sequence."""

from __future__ import annotations

from collections.abc import Sequence

from minidistill.config import Config
from minidistill.errors import UserError
from minidistill.types import Prompt


def check_lengths(config: Config, limit: int, prompts: Sequence[Prompt]) -> None:
    """Raise UserError where a teacher's prompt and a completion exceed `limit` tokens together."""
    max_tokens = config.orchestrator.sampling.max_tokens
    longest = max(prompts, key=lambda p: len(p.teacher_ids))
    length = len(longest.teacher_ids) + max_tokens
    if length > limit:
        by = "seq_len" if limit == config.seq_len else "the model's longest sequence"
        raise UserError(
            f"context and prompt ({len(longest.teacher_ids)} tokens, task {longest.task.id}) plus "
            f"max_tokens ({max_tokens}) make {length} tokens, more than {by} ({limit})",
            where="seq_len, orchestrator.teacher_model.context, orchestrator.sampling.max_tokens",
            fix="shorten the context, lower max_tokens, or raise seq_len within the model's limit",
        )
