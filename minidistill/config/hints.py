"""Names of settings in other trainers, and what they are called here."""

from __future__ import annotations

from minidistill.config.schema_tree import Path

_BATCH = (
    "use `orchestrator.batch_size`, the rollouts of a whole step on all devices; the trainer "
    "divides them into micro-batches that fit (`trainer.micro_batch_tokens`)"
)
_GROUP = "use `orchestrator.rollouts_per_example`"
_KL = (
    "use `trainer.loss.teacher_tau` and `trainer.loss.student_tau`, the weights of the KL to the "
    "teacher's two terms"
)
_LENGTH = "use `seq_len` at the top level, for context, prompt and completion together"
_COMPLETION = "use `orchestrator.sampling.max_tokens`"
_EPOCHS = (
    "use `max_steps`: an epoch is training tasks × `orchestrator.rollouts_per_example` / "
    "`orchestrator.batch_size` steps"
)
_QUANTIZED = 'use `model.quantization` = "nf4"'
_DTYPE = 'use `model.dtype`: "auto", "bfloat16", "float16" or "float32"'
_SCHEDULER = "use `trainer.scheduler.type`"
_NORM = "use `trainer.optim.max_norm`"
_MODEL = "use `model.name`"
_TEACHER = "use `teacher_inference.model.name` if the teacher is not the student's base model"
_CONTEXT = "use `orchestrator.teacher_model.context`"
_DATA = 'use [[orchestrator.env]] with id = "jsonl" and args = { path = "prompts.jsonl" }'
_TP = "use `inference.parallel.tp`"
_REWARD = "use `reward` in the args of an environment: see docs/environments.md"
_ONCE = "drop it: each rollout is trained on once"
_ON_POLICY = "drop it: every completion is the student's own"

_KEYS = {
    "trainer.optim.beta": "use `trainer.optim.betas1` and `trainer.optim.betas2`",
    "trainer.optim.betas": "use `trainer.optim.betas1` and `trainer.optim.betas2`",
    "orchestrator.n": _GROUP,
    "orchestrator.sampling.n": _GROUP,
}
_NAMES = {
    "learning_rate": "use `trainer.optim.lr`",
    "optimizer": "use the table `[trainer.optim]`",
    "adam_beta1": "use `trainer.optim.betas1`",
    "adam_beta2": "use `trainer.optim.betas2`",
    "adam_epsilon": "drop it: AdamW's epsilon is torch's default",
    "max_grad_norm": _NORM,
    "gradient_clipping": _NORM,
    "lr_scheduler": _SCHEDULER,
    "lr_scheduler_type": _SCHEDULER,
    "warmup_ratio": "use `trainer.scheduler.warmup_steps`, in steps",
    "num_train_epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "epochs": _EPOCHS,
    "total_epochs": _EPOCHS,
    "gradient_accumulation_steps": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "mini_batch_size": _BATCH,
    "per_device_eval_batch_size": "use `orchestrator.eval.batch_size`",
    "num_generations": _GROUP,
    "group_size": _GROUP,
    "num_iterations": _ONCE,
    "ppo_epochs": _ONCE,
    "beta": _KL,
    "kl_coef": _KL,
    "kl_loss_coef": _KL,
    "lmbda": _ON_POLICY,
    "seq_kd": _ON_POLICY,
    "alpha": (
        "use `trainer.model.lora.alpha` for the adapter's scale; the weight of distillation is "
        "`trainer.loss.teacher_tau`"
    ),
    "r": "use `trainer.model.lora.rank`",
    "lora_r": "use `trainer.model.lora.rank`",
    "lora_rank": "use `trainer.model.lora.rank`",
    "lora_alpha": "use `trainer.model.lora.alpha`",
    "lora_dropout": "use `trainer.model.lora.dropout`",
    "lora_target_modules": "use `trainer.model.lora.target_modules`",
    "max_new_tokens": _COMPLETION,
    "max_completion_length": _COMPLETION,
    "max_response_length": _COMPLETION,
    "max_length": _LENGTH,
    "max_prompt_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "sequence_len": _LENGTH,
    "cutoff_len": _LENGTH,
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "torch_dtype": _DTYPE,
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "bnb_4bit_quant_type": _QUANTIZED,
    "attn_implementation": "use `model.attn`",
    "gradient_checkpointing": "use `trainer.model.ac`",
    "save_steps": "use `ckpt.interval`",
    "save_total_limit": "use `ckpt.keep`",
    "eval_steps": "use `orchestrator.eval.interval`",
    "logging_steps": "drop it: every step is recorded",
    "report_to": "use the tables `[wandb]`, `[tensorboard]` and `[trackio]`, or drop it",
    "load_best_model_at_end": "use `ckpt.best`",
    "metric_for_best_model": "use `ckpt.best`",
    "early_stopping_patience": "use `early_stopping.patience`",
    "early_stopping_threshold": "use `early_stopping.min_delta`",
    "run_name": "use `wandb.name`",
    "model_name": _MODEL,
    "model_name_or_path": _MODEL,
    "base_model": _MODEL,
    "teacher_model_name_or_path": _TEACHER,
    "system_prompt": _CONTEXT,
    "dataset": _DATA,
    "dataset_name": _DATA,
    "train_file": _DATA,
    "reward_funcs": _REWARD,
    "reward_function": _REWARD,
    "use_vllm": "use `inference.engine`",
    "tensor_parallel_size": _TP,
    "vllm_tensor_parallel_size": _TP,
    "vllm_gpu_memory_utilization": "use `inference.gpu_memory_utilization`",
}


def fix_for_name(path: Path) -> str:
    """What to write instead of another trainer's setting, wherever it stands; "" for others."""
    key = ".".join(str(part) for part in path)
    return _KEYS.get(key) or _NAMES.get(str(path[-1]), "")
