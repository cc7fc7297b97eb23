"""The benchmark of decoding: its floor by hand, and a run on the shipped model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import decode
from minidistill.models.registry import BUILT_IN
from minidistill.placement.model_shape import read_shape


def test_the_floor_of_a_step() -> None:
    from transformers import AutoConfig

    shape = read_shape(AutoConfig.from_pretrained(BUILT_IN["tiny-sokoban"]))
    weights = shape.body + shape.vocab * shape.hidden
    floor = decode.step_floor(shape, batch=8, group=4, prompt=100, new=16)
    # two prompts, and half of each completion
    tokens = 2 * 100 + 8 * 8
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim
    assert floor["bytes"] == 4 * (weights + tokens * per_token)
    # a product and a sum for each weight and row; queries with keys, and weights with values
    pairs = 8 * (100 + 8)
    products = 2 * shape.layers * shape.heads * shape.head_dim * pairs
    assert floor["flops"] == 2 * (8 * weights + products)


def test_a_run_reports_the_share_of_the_floor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved: dict[str, Any] = {}
    monkeypatch.setattr(decode, "save", lambda name, key, result: saved.update({key: result}))
    monkeypatch.setattr(decode, "memory_peak", lambda clock: 1e9)
    monkeypatch.setattr(decode, "matrix_peak", lambda clock: 1e12)
    monkeypatch.setattr(decode, "use_threads", lambda threads: None)
    flags = ["--model", "tiny-sokoban", "--batch", "4", "--group", "2", "--new", "8"]
    assert decode.main([*flags, "--repeats", "1"]) == 0
    ((key, row),) = saved.items()
    assert key == "tiny-sokoban, 4 in groups of 2, 40 + 8 tokens, 1 threads"
    assert row["reading"] == row["bytes"] / 1e9 > row["computing"] == row["flops"] / 1e12
    assert row["share"] == pytest.approx(row["reading"] / row["step"])
    assert "batch 4:" in capsys.readouterr().out
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("flags", [["--new", "1"], ["--group", "3"]])
def test_impossible_settings_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        decode.arguments(flags)
