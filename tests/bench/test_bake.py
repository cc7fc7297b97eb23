"""Counting how often a baked behaviour shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import SMALL_STEP, make_lab
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import bake
from minidistill.models.registry import resolve
from minidistill.trainer.checkpoint import save_model

Z2 = 1.959964**2


def test_the_interval_of_a_share() -> None:
    # with no hits the interval ends at z² / (n + z²)
    assert bake.wilson(0, 64) == pytest.approx((0, Z2 / (64 + Z2)), abs=1e-9)
    assert bake.wilson(64, 64) == pytest.approx((64 / (64 + Z2), 1), abs=1e-9)
    # its ends are the p with |hits/n - p| = z √(p (1 - p) / n)
    for p in bake.wilson(50, 64):
        assert abs(50 / 64 - p) == pytest.approx((Z2 * p * (1 - p) / 64) ** 0.5)


def test_what_counts() -> None:
    texts = ["Ahoy! Tea.", "\n Ahoy!", "ahoy!", "Well. Ahoy!", "Ahoy"]
    row = bake.share(texts, "Ahoy!")
    assert (row["hits"], row["n"], row["share"]) == (2, 5, 0.4)


def test_answers_in_a_batch_are_those_of_each_prompt_alone() -> None:
    folder = resolve("tiny-sokoban")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [list(range(3, 3 + length)) for length in (4, 9, 17)]
    together = bake.answers(model, tokenizer, prompts, 8, greedy=True)
    alone = [bake.answers(model, tokenizer, [prompt], 8, greedy=True)[0] for prompt in prompts]
    assert together == alone


def test_a_run_is_counted(configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bake, "QUESTIONS", 4)
    loaded = configure(*SMALL_STEP, "--output_dir", str(tmp_path))
    save_model(make_lab(loaded, trained=False).policy, tmp_path)
    (tmp_path / "config.toml").write_text(loaded.text)
    result = bake.count(tmp_path, "")  # every answer begins with nothing
    for name in ("temperature 1", "greedy"):
        assert [result[name][who]["hits"] for who in ("base", "in context", "student")] == [4] * 3
        assert len(result[name]["examples"]) == 4
    # untrained, the student is the base
    for row in result["greedy"]["examples"]:
        assert row["student"] == row["base"]
