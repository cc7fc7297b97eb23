"""Check that context, prompt and completion fit into a sequence."""

from __future__ import annotations

from collections.abc import Sequence

from minidistill.config import Config
from minidistill.errors import UserError
from minidistill.types import Prompt


def check_lengths(config: Config, limit: int, prompts: Sequence[Prompt]) -> None:
    """Raise UserError if a teacher's prompt and a completion can exceed `limit` tokens."""
    max_tokens = config.orchestrator.sampling.max_tokens
    longest = max(prompts, key=lambda prompt: len(prompt.teacher_ids))
    prompt_length = len(longest.teacher_ids)
    length = prompt_length + max_tokens
    if length > limit:
        name = "seq_len" if limit == config.seq_len else "the model's longest sequence"
        raise UserError(
            f"context and prompt ({prompt_length} tokens, task {longest.task.id}) plus max_tokens "
            f"({max_tokens}) make {length} tokens, more than {name} ({limit})",
            where="seq_len, orchestrator.teacher_model.context, orchestrator.sampling.max_tokens",
            fix="shorten the context, lower max_tokens, or raise seq_len within the model's limit",
        )
