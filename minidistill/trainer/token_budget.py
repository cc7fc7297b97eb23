"""Passes outside a training step: in batches that halve on OOM."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from minidistill.trainer.batching import split_by_tokens
from minidistill.trainer.guards import first_line, is_out_of_memory, out_of_memory_error

T = TypeVar("T")
logger = logging.getLogger(__name__)


class TokenBudget:
    """The most tokens of one pass without gradients, padding included.

    On OOM it is halved for the rest of the run. Without `tokens` there is no bound at first.
    """

    def __init__(self, tokens: int = sys.maxsize) -> None:
        self.tokens = tokens

    def run(
        self,
        lengths: Sequence[int],
        run_batch: Callable[[list[int]], Sequence[T]],
        doing: str,
        *,
        packed: bool = False,
        at_most: int = sys.maxsize,
    ) -> list[T]:
        """One result for each row, in the order of the rows.

        `run_batch` takes the indices of a batch's rows and returns their results. `lengths` are the
        rows' tokens; `packed` batches have no padding. `at_most` bounds the tokens of this call's
        passes too. `doing` says what the passes are for, after "while". Raises UserError (exit code
        3) if a single row does not fit in memory.
        """
        results: dict[int, T] = {}
        while len(results) < len(lengths):
            remaining = [i for i in range(len(lengths)) if i not in results]
            limit = min(self.tokens, at_most)
            for group in split_by_tokens([lengths[i] for i in remaining], limit, packed):
                rows = [remaining[i] for i in group]
                values, message = _attempt(run_batch, rows)
                if message is not None:
                    self._halve([lengths[i] for i in rows], message, doing, packed)
                    break
                results.update(zip(rows, values, strict=True))
        return [results[i] for i in range(len(lengths))]

    def _halve(self, lengths: Sequence[int], message: str, doing: str, packed: bool) -> None:
        if len(lengths) == 1:
            raise out_of_memory_error(
                f"{doing}, with one sequence of {lengths[0]} tokens",
                message,
                where="orchestrator.sampling.max_tokens",
                fix="shorten the context or orchestrator.sampling.max_tokens, give engines on this "
                "GPU less (inference.gpu_memory_utilization), or use more GPUs",
            )
        # start from what was in use: a much larger budget would have to be halved several times
        used = sum(lengths) if packed else max(lengths) * len(lengths)
        self.tokens = min(self.tokens, used) // 2
        logger.warning(
            f"out of memory while {doing} ({message}): {self.tokens} tokens at a time from here on"
        )


def _attempt(
    run_batch: Callable[[list[int]], Sequence[T]], rows: list[int]
) -> tuple[Sequence[T], str | None]:
    """The results, or on OOM the allocator's message.

    The error is not raised, because its traceback would keep the pass's tensors in memory.
    """
    try:
        return run_batch(rows), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = first_line(error)
    torch.cuda.empty_cache()
    return [], message
