"""A run's recorded figures against transformers and peft alone: float64, a sequence at a time."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def largest_difference(run: Path, model: Path, step: int, temperature: float = 1.0) -> float:
    """The largest error of a step's log-probs and KL, nats.

    The student's weights are those of the checkpoint of the step before.
    """
    from transformers import AutoTokenizer

    teacher = load_float64(model)
    student: Any = teacher
    if step > 1:
        from peft import PeftModel

        folder = run / "checkpoints" / f"step_{step - 1:06d}" / "adapter"
        student = PeftModel.from_pretrained(teacher, str(folder)).double()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tensors = load_file(run / "rollouts" / f"step_{step:06d}.safetensors")
    lines = (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    offsets = tensors["offsets"].tolist()
    errors, kl = [], []
    for number, record in enumerate(map(json.loads, lines)):
        at = slice(offsets[number], offsets[number + 1])
        ids_N = tensors["token_ids"][at].long()
        views = [record["prompt_text"], record["teacher_prompt_text"]]
        prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in views]
        logp_NV = logprobs(student, prompts[0], ids_N, temperature)
        with student.disable_adapter() if step > 1 else nullcontext():
            logq_NV = logprobs(student, prompts[1], ids_N, temperature)
        kl_N = (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)
        kl.append(kl_N)
        for name, expected_N in (
            ("student_logprobs", logp_NV.gather(1, ids_N[:, None])[:, 0]),
            ("teacher_logprobs", logq_NV.gather(1, ids_N[:, None])[:, 0]),
            ("kl", kl_N),
        ):
            errors.append(float((tensors[name][at] - expected_N).abs().max()))
    metrics = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    logged = next(m["teacher_kl"] for m in metrics if m["step"] == step and "teacher_kl" in m)
    errors.append(abs(float(torch.cat(kl).mean()) - logged))
    assert all(error >= 0 for error in errors), "an error is NaN"
    return max(errors)


def load_float64(model: Path) -> Any:
    """The model in float64, with transformers' plain code for attention and experts."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    settings = AutoConfig.from_pretrained(model)
    experts = any("experts" in name for name in settings.get_text_config().to_dict())
    options = {"experts_implementation": "eager"} if experts else {}
    kind = AutoModelForCausalLM if type(settings) in CAUSAL else AutoModelForImageTextToText
    return kind.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager", **options
    ).eval()


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], ids_N: Tensor, temperature: float) -> Tensor:
    """Log-probs at the positions of a completion, (N, V)."""
    sequence = torch.tensor([[*prompt, *ids_N.tolist()]])
    logits_LV = model(input_ids=sequence, use_cache=False).logits[0].double()
    return (logits_LV[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
