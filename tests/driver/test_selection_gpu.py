"""The best weights, taken back by an engine that sleeps on the trainer's GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import TINY, board, run_on_gpus

from minidistill.errors import EXIT_OK


@pytest.mark.gpu
def test_an_engine_that_sleeps_takes_back_the_best_weights(tmp_path: Path) -> None:
    flags = (
        *TINY, "--ckpt.best", "heldout_kl", "--orchestrator.eval.interval", "1",
        "--early_stopping.patience", "2", "--trainer.optim.lr", "0.05",
        "--trainer.scheduler.type", "constant",
    )  # fmt: skip
    assert run_on_gpus(tmp_path, (*flags, "--inference.engine", "vllm"), flags) == EXIT_OK
    found = board(tmp_path)
    assert found["best_step"] < found["steps"] < 6, "this rate is too high to go on"
    # computed with the weights that were taken back; vLLM's samples depend on the batch
    assert found["heldout_kl_after"] == pytest.approx(found["best_value"], rel=0.1)
