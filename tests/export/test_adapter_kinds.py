"""Every kind of adapter, and bases that are not there any more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import BASE, export, logits, make_run, with_adapter
from transformers import AutoModelForCausalLM

from minidistill.cli import main

LORA = "--trainer.model.lora"
KINDS = {
    "dora": (f"{LORA}.use_dora",),
    "rslora": (f"{LORA}.use_rslora",),
    "ranks": (f"{LORA}.rank_pattern", '{ q_proj = 4, "layers.1.mlp.up_proj" = 32 }'),
    "layers": (f"{LORA}.target_modules", '["q_proj", "down_proj"]', f"{LORA}.rank", "3"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_every_kind_computes_the_same(
    configure: Any, tmp_path: Path, kind: str, merged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(configure, tmp_path / "mine", *KINDS[kind])
    target = tmp_path / "out"
    assert export(run, target, *(["--merge"] if merged else [])) == 0
    out = capsys.readouterr().out
    expected = logits(with_adapter(run / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert float((logits(base) - expected).abs().max()) > 0.1, "the run has trained nothing"
    found = (
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        if merged
        else with_adapter(target)
    )
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=5e-4)
    serves = merged or kind != "dora"
    assert ("\n  vllm serve " in out) == serves
    assert ("which is DoRA: export it with --merge" in out) == (not serves)
    assert ("--max-lora-rank 32" in out) == (kind == "ranks" and not merged)
    assert ("--max-lora-rank 8 " in out) == (kind == "layers" and not merged)


@pytest.mark.vllm
def test_vllm_loads_it_and_computes_the_same(
    configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(configure, tmp_path / "mine", *KINDS["rslora"], *KINDS["ranks"])
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert "checked in vLLM: KL " in capsys.readouterr().out
    assert "| vLLM |" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_has_gone(
    configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    run = make_run(configure, tmp_path / "mine", "--model.name", str(base))
    shutil.rmtree(base)
    assert export(run, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert str(base) in error
    assert "fix: " in error
    assert not (tmp_path / "out").exists()


def test_weights_of_the_base_that_have_gone(
    configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    run = make_run(configure, tmp_path / "mine", "--model.name", str(base))
    (base / "model.safetensors").unlink()
    assert export(run, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert str(base) in error
    assert {path.name for path in tmp_path.iterdir()} == {"base", "mine"}
