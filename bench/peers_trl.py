"""TRL's side of `bench.peers`: a process that takes a step of SDFTTrainer when it is told to.

    PYTHON-OF-TRL bench/peers_trl.py FOLDER full_logits|topk_logits

It runs in TRL's own environment and imports nothing of minidistill. Nothing of TRL is changed but
the first step, in which it does not sample: it gets the completions in FOLDER/first_step.json and
the adapter that sampled them, so that its loss can be compared.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer


def main(folder: Path, mode: str) -> None:
    case = json.loads((folder / "trl.json").read_text())
    first = json.loads((folder / "first_step.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(case["folder"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(case["folder"], padding_side="left")
    trainer = FirstGiven(
        model=model,
        args=settings(case, mode, folder),
        train_dataset=dataset(first, folder, case["group"]),
        processing_class=tokenizer,
        callbacks=[Commands()],
        peft_config=LoraConfig(
            r=case["rank"], lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
        ),
    )
    trainer.given = first["rollouts"]
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    loaded: Any = set_peft_model_state_dict(trainer.model, tensors)
    if loaded.unexpected_keys:
        raise SystemExit(f"the adapter has {loaded.unexpected_keys[0]}, TRL's model does not")
    trainer.train()


def settings(case: dict[str, Any], mode: str, folder: Path) -> SDFTConfig:
    """The objective is the reverse KL (alpha 1). A bucket for all other ids makes `topk_logits`
    the estimate that minidistill's `top_k` is."""
    return SDFTConfig(
        output_dir=str(folder / f"trl-{mode}"),
        distillation_mode=mode,
        distillation_alpha=1.0,
        distillation_topk=case["top_k"],
        distillation_add_tail=True,
        teacher_model_kind="base",
        teacher_prompt_template="{privileged_context}{prompt}",
        max_prompt_length=None,
        num_generations=case["group"],
        per_device_train_batch_size=case["batch"],
        max_completion_length=case["completion"],
        generation_kwargs={"min_new_tokens": case["completion"]},
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        learning_rate=1e-4,
        max_steps=case["steps"],
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def dataset(first: dict[str, Any], folder: Path, group: int) -> Dataset:
    """The prompts of the first step, then all others."""
    prompts = [rollout["prompt"] for rollout in first["rollouts"][::group]]
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    texts = (json.loads(line)["prompt"] for line in lines)
    others = ([{"role": "user", "content": text}] for text in texts)
    prompts += [prompt for prompt in others if prompt not in prompts]
    return Dataset.from_list(
        [{"prompt": prompt, "privileged_context": first["context"]} for prompt in prompts]
    )


class FirstGiven(SDFTTrainer):
    """Takes the given completions in its first step, after a check that the prompts are equal."""

    given: list[dict[str, Any]]

    def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        if not self.given:
            return super()._generate(prompt_ids)
        rollouts, self.given = self.given, []
        same(prompt_ids, [rollout["student_ids"] for rollout in rollouts], "student")
        self.expected = [r["teacher_ids"] + r["completion_ids"] for r in rollouts]
        return prompt_ids, [rollout["completion_ids"] for rollout in rollouts]

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        given = self.given
        batch = super()._prepare_training_batch(inputs)
        if given:
            rows = zip(batch["teacher_input_ids"], batch["teacher_attention_mask"], strict=True)
            same([ids[mask.bool()].tolist() for ids, mask in rows], self.expected, "teacher")
        return batch


def same(ids: list[list[int]], expected: list[list[int]], role: str) -> None:
    if ids != expected:
        raise SystemExit(f"TRL's {role} prompts are not minidistill's: {ids[0]}, {expected[0]}")


class Commands(TrainerCallback):
    """Waits for a line on stdin before each step but the first, and answers after it."""

    def __init__(self) -> None:
        self.began, self.seconds, self.first = (0.0, 0.0), (0.0, 0.0), True

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if not self.first and sys.stdin.readline().strip() != "step":
            sys.exit(0)
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds = now[0] - self.began[0], now[1] - self.began[1]

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        logs: dict[str, float] = more["logs"]
        if "grad_norm" not in logs:
            return  # the summary after the last step
        length = logs["completions/min_length"], logs["completions/max_length"]
        values = {
            "seconds": self.seconds[0],
            "cpu_seconds": self.seconds[1],
            "loss": logs["loss"],
            "grad_norm": float(logs["grad_norm"]),
            "lengths": length,
            "peak_bytes": peak_rss(),
        }
        answers.write(json.dumps(values | {"ready": self.first}) + "\n")
        answers.flush()
        self.first = False


def peak_rss() -> int:
    """Bytes that this process has held at most, since its program began."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    # only answers go to stdout: transformers prints what it logs there
    answers, sys.stdout = sys.stdout, sys.stderr
    main(Path(sys.argv[1]), sys.argv[2])
