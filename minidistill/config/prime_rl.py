"""Keys and values of the public trainer (prime-rl) that minidistill refuses.

An error is better than a setting that is silently ignored, so each is named here with a fix.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from minidistill.config.schema_tree import Path

_ONE_MODEL = "use `model.name`; a teacher of another model is `teacher_inference.model.name`"
_SYNC = "use `schedule`: sync, or async for rollouts that are at most one update old"
_IN_MEMORY = "drop it: weights always reach the engines in memory"
_SERVER = "use `{0}.server_urls`, or drop it: the run starts its own engines"
_STUDENTS, _TEACHERS = _SERVER.format("inference"), _SERVER.format("teacher_inference")
_DIFFICULTY = "drop it: every sampled group is trained on; choose problems with the env's `args`"
_SAMPLER = (
    "drop it: the objective needs the sampler's full distribution at one temperature; "
    "only `orchestrator.sampling.temperature` can be set"
)
_NOT_SERVED = "drop it: vLLM cannot serve an adapter with it"
_LAUNCH = "drop it: submit `minidistill run` yourself; torchrun starts it on several machines"
_TEMPLATE_ARGUMENTS = "use the table `[model.chat_template_kwargs]`"
_RATIO = "use `trainer.loss.ratio_clip_high`, `token_mask_low` and `token_mask_high`"
_EAGER_TRAINER = "drop it: the trainer runs transformers' own modules"
_TEACHER = "use `teacher_inference.model.name` if the teacher is not the student's base model"

_KEYS = {
    "trainer.max_steps": "use `max_steps` at the top level",
    "orchestrator.max_steps": "use `max_steps` at the top level",
    "orchestrator.seq_len": "use `seq_len` at the top level",
    "trainer.model.seq_len": "use `seq_len` at the top level",
    "trainer.seq_len": "use `seq_len` at the top level",
    "inference.model.max_model_len": "use `seq_len` at the top level",
    "trainer.model.name": "use `model.name`",
    "orchestrator.model.name": "use `model.name`",
    "inference.model.name": "use `model.name`",
    "orchestrator.model": _ONE_MODEL,
    "inference.model": "use the table `[model]`",
    "trainer.model.attn": "use `model.attn`",
    "trainer.model.trust_remote_code": "use `model.trust_remote_code`",
    "*chat_template_kwargs": _TEMPLATE_ARGUMENTS,
    "*enable_thinking": _TEMPLATE_ARGUMENTS,
    "*chat_template": "use `model.chat_template`, the name of a file",
    "*tokenizer": "drop it: the tokenizer is the model's; a template is `model.chat_template`",
    "trainer.loss.type": "drop it: there is one objective, weighted by the three taus",
    "trainer.loss.ratio_type": "drop it: the ratio is per token",
    "trainer.loss.kl_tau": "use `trainer.loss.teacher_tau` and `trainer.loss.student_tau`",
    "trainer.loss.*mask_*": _RATIO,
    "trainer.loss.sequence_clip_high": _RATIO,
    "weight_broadcast": _IN_MEMORY,
    "*.weight_broadcast": _IN_MEMORY,
    "*.rollout_transport": "drop it: rollouts never leave the process",
    "orchestrator.client": _STUDENTS,
    "inference.server": _STUDENTS,
    "teacher_inference.server": _TEACHERS,
    "*async_level": _SYNC,
    "orchestrator.max_off_policy_steps": _SYNC,
    "orchestrator.buffer.easy_*": _DIFFICULTY,
    "orchestrator.buffer.hard_*": _DIFFICULTY,
    "orchestrator.buffer.online_difficulty_filtering": _DIFFICULTY,
    "orchestrator.buffer.env_ratios": _DIFFICULTY,
    "orchestrator.buffer.hash_keys": _DIFFICULTY,
    "orchestrator.buffer.seed": "use `seed` at the top level",
    "orchestrator.seed": "use `seed` at the top level",
    "inference.seed": "use `seed` at the top level",
    "orchestrator.sampling.top_p": _SAMPLER,
    "orchestrator.sampling.top_k": _SAMPLER,
    "orchestrator.sampling.min_p": _SAMPLER,
    "orchestrator.sampling.min_tokens": _SAMPLER,
    "orchestrator.sampling.repetition_penalty": _SAMPLER,
    "orchestrator.sampling.temp_scheduler": _SAMPLER,
    "orchestrator.sampling.extra_body": _SAMPLER,
    "orchestrator.sampling.seed": "use `seed` at the top level",
    "orchestrator.teacher_model.model": _TEACHER,
    "orchestrator.teacher_model.client": _TEACHERS,
    "*teacher_rollout_model": "drop it: training is on-policy, so only the student samples",
    "orchestrator.max_concurrent": "drop it: the engine schedules a whole step itself",
    "orchestrator.oversampling_factor": "drop it: every rollout that is sampled is trained on",
    "orchestrator.token_batch_size": "use `orchestrator.batch_size`, counted in rollouts",
    "orchestrator.eval.eval_base_model": "use `orchestrator.teacher_model.eval_baseline`",
    "orchestrator.advantage.type": "drop it: the reward minus its group's mean",
    "trainer.model.experimental": _EAGER_TRAINER,
    "trainer.model.compile": _EAGER_TRAINER,
    "trainer.model.fsdp_cpu_offload": (
        "drop it: with LoRA the optimizer is small; lower `trainer.micro_batch_tokens` instead"
    ),
    "trainer.dist_timeout_seconds": "use `silence.step`",
    "trainer.memory_profiler_path": "drop it: every step logs `perf/peak_memory_gib/trainer`",
    "slurm": _LAUNCH,
    "deployment": _LAUNCH,
    "trainer.model.lora.modules_to_save": (
        "drop it: a trained copy of the embedding or the head would have to be kept for both roles "
        "and served by vLLM, which cannot; `trainer.model.lora = false` trains every weight"
    ),
    "trainer.model.lora.bias": _NOT_SERVED,
    "ckpt.keep_last": "use `ckpt.keep`",
    "ckpt.resume_step": "run again with `--resume`; it takes the latest valid checkpoint",
    "trainer.ckpt": "use the table `[ckpt]`",
    "orchestrator.ckpt": "use the table `[ckpt]`",
    "trainer.wandb": "use the table `[wandb]`",
    "orchestrator.wandb": "use the table `[wandb]`",
    "trainer.output_dir": "use `output_dir` at the top level",
    "orchestrator.output_dir": "use `output_dir` at the top level",
}

_VALUES = {
    ("trainer.model.impl", "custom"): 'use "auto" or "hf": both are transformers\' own modules',
    ("trainer.model.impl", "liger_kernel"): 'use "auto" or "hf": the loss has its own kernels',
    ("trainer.optim.type", "muon"): 'use "adamw": muon is made for full matrices, not for LoRA',
    ("trainer.optim.type", "sgd"): 'use "adamw"',
}


def fix_for_key(path: Path) -> str:
    """What to do instead of a key of the public trainer, or of one in its tables; "" for others."""
    for length in range(len(path), 0, -1):
        key = ".".join(str(part) for part in path[:length])
        for pattern, fix in _KEYS.items():
            if fnmatchcase(key, pattern):
                return fix
    return ""


def fix_for_value(key: str, value: object) -> str:
    """What to do instead of a value of the public trainer; "" for others."""
    return _VALUES.get((key, value), "") if isinstance(value, str) else ""
