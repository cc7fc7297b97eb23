"""How far training has moved a model on plain prose: the KL between base and student on it.

The scoreboard's drift is measured on answers to 16 unrelated questions, in the chat template. Here
both models read the 16 paragraphs of bench/prose.txt, without a template, and their distributions
of each next token are compared. What a context does to a chat should leave these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from minidistill.config import load_config
from minidistill.models.registry import resolve

PROSE = Path(__file__).with_name("prose.txt")


def paragraphs() -> list[str]:
    """The texts, each on one line in the file, with empty lines between them."""
    return PROSE.read_text().strip().split("\n\n")


def text_drift(run_folder: str | Path) -> float:
    """Mean KL(base‖student) of the next token over the paragraphs, nats, at temperature 1.

    `run_folder` is that of a run that has trained an adapter.
    """
    run = Path(run_folder)
    folder = resolve(load_config([str(run / "config.toml")]).config.model.name)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return mean_kl(model, [tokenizer(text)["input_ids"] for text in paragraphs()])


@torch.no_grad()
def mean_kl(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """Mean KL(without the adapter‖with it) over all tokens of the texts but each one's first."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([text])
        student = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        with model.disable_adapter():
            base = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        total += float((base.exp() * (base - student)).sum())
        count += len(text) - 1
    return total / count
