"""The drift on plain prose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import SMALL_STEP, make_lab
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.text_drift import PROSE, paragraphs, text_drift
from minidistill.models.registry import resolve
from minidistill.trainer.checkpoint import save_model


def run_of(configure: Any, folder: Path, *, trained: bool) -> Path:
    loaded = configure(*SMALL_STEP, "--output_dir", str(folder))
    folder.mkdir()
    save_model(make_lab(loaded, trained=trained).policy, folder)
    (folder / "config.toml").write_text(loaded.text)
    return folder


def test_the_paragraphs() -> None:
    texts = paragraphs()
    assert len(texts) == len(set(texts)) == 16
    assert "\n\n".join(texts) + "\n" == PROSE.read_text()
    assert all(40 <= len(text.split()) <= 70 and "\n" not in text for text in texts)


def test_an_untrained_adapter_does_not_drift(configure: Any, tmp_path: Path) -> None:
    assert text_drift(run_of(configure, tmp_path / "run", trained=False)) == 0.0


def test_the_drift_is_the_kl_from_the_base(configure: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    run = run_of(configure, tmp_path / "run", trained=True)
    folder = resolve("tiny-sokoban")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    student = PeftModel.from_pretrained(student, str(run / "adapter")).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kl = []
    for text in paragraphs():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, :-1].softmax(-1) for model in (base, student))
        kl.append((p * (p / q).log()).sum(-1))
    expected = float(torch.cat(kl).mean())
    assert expected > 1e-3
    assert text_drift(run) == pytest.approx(expected, rel=1e-4)
