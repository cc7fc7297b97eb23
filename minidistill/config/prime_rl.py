"""Keys and values of the public trainer that minidistill refuses, and what to do instead.

A setting that would be ignored is worse than an error, so each is named here with a way on.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from minidistill.config.schema_tree import Path, walk

_ONE_MODEL = "use `model.name`; a teacher of another model is `teacher_inference.model.name`"
_SYNC = "use `schedule`: sync, or async for rollouts that are at most one update old"
_IN_MEMORY = "drop it: weights always reach the engines in memory"
_SERVER = "use `{0}.server_urls`, or drop it: the driver starts and owns its engines"
_STUDENTS, _TEACHERS = _SERVER.format("inference"), _SERVER.format("teacher_inference")
_DIFFICULTY = "drop it: every sampled group is trained on; choose problems in the env's args"
_SAMPLER = (
    "drop it: the objective needs the sampler's full distribution at one temperature; "
    "`orchestrator.sampling.temperature` is what can be set"
)
_NOT_SERVED = "drop it: vLLM cannot serve such an adapter"
_LAUNCH = "drop it: one process on one machine; submit that command to the cluster yourself"
_RATIO = "use `trainer.loss.ratio_clip_high`, `token_mask_low` and `token_mask_high`"
_EAGER_TRAINER = "drop it: the trainer runs transformers' own modules"
_TEACHER = "use `teacher_inference.model.name` where the teacher is not the student's own base"

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
    "trainer.loss.type": "drop it: there is one objective, weighed by the three taus",
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
    "*teacher_rollout_model": "drop it: on-policy, so only the student samples in training",
    "orchestrator.max_concurrent": "drop it: the engine schedules a whole step by itself",
    "orchestrator.oversampling_factor": "drop it: every rollout that is sampled is trained on",
    "orchestrator.token_batch_size": "use `orchestrator.batch_size`, counted in rollouts",
    "orchestrator.eval.eval_base_model": "use `orchestrator.teacher_model.eval_baseline`",
    "orchestrator.advantage.type": "drop it: the reward minus its group's mean",
    "trainer.model.experimental": _EAGER_TRAINER,
    "trainer.model.compile": _EAGER_TRAINER,
    "trainer.model.fsdp_cpu_offload": (
        "drop it: with LoRA the optimizer is small; lower `trainer.micro_batch_tokens` instead"
    ),
    "trainer.dist_timeout_seconds": "drop it: ranks start together on one machine",
    "trainer.memory_profiler_path": "drop it: peak memory is among the metrics of every step",
    "slurm": _LAUNCH,
    "deployment": _LAUNCH,
    "trainer.model.lora.use_dora": _NOT_SERVED,
    "trainer.model.lora.modules_to_save": _NOT_SERVED,
    "trainer.model.lora.bias": _NOT_SERVED,
    "ckpt.keep_last": "use `ckpt.keep`",
    "ckpt.resume_step": "run again with `--resume`; it takes the latest sound checkpoint",
    "trainer.ckpt": "use the table `[ckpt]`",
    "orchestrator.ckpt": "use the table `[ckpt]`",
    "trainer.wandb": "use the table `[wandb]`",
    "orchestrator.wandb": "use the table `[wandb]`",
    "trainer.output_dir": "use `output_dir` at the top level",
    "orchestrator.output_dir": "use `output_dir` at the top level",
}

_VALUES = {
    ("trainer.model.impl", "custom"): 'take "auto" or "hf": both are transformers\' own modules',
    ("trainer.model.impl", "liger_kernel"): 'take "auto" or "hf": the loss has kernels of its own',
    ("trainer.optim.type", "muon"): 'take "adamw": muon is made for full matrices, not for LoRA',
    ("trainer.optim.type", "sgd"): 'take "adamw"',
}

_REQUIRED = {
    "orchestrator.env": 'add [[orchestrator.env]] with id = "sokoban-env"',
    "orchestrator.teacher_model.context": (
        'set context = "…" or context_file = "…" in [orchestrator.teacher_model]'
    ),
}


def for_key(path: Path) -> str:
    """What to do instead of a known foreign key (or one inside a foreign table), or ""."""
    for length in range(len(path), 0, -1):
        key = ".".join(str(part) for part in path[:length])
        for pattern, instead in _KEYS.items():
            if fnmatchcase(key, pattern):
                return instead
    return ""


def for_value(key: str, value: object) -> str:
    """What to do instead of a known foreign value, or ""."""
    return _VALUES.get((key, value), "") if isinstance(value, str) else ""


def for_missing(key: str) -> str:
    """How to give a required key."""
    return _REQUIRED.get(key, f"set {key}")


def nearest(path: Path) -> str:
    """The valid key closest to an unknown one, or ""."""
    wanted = [str(part) for part in path]
    plain = tuple("*" if part.isdecimal() else part for part in wanted)
    keys = {".".join(map(str, found)): found for found, _ in walk()}
    # The right words with a table left out: `loss.adv_tau`, `trainer.lora.rank`, `lr`.
    inside = [found for found in keys.values() if _is_within(plain, found)]
    if inside:
        return _with_indices(min(inside, key=len), wanted)
    # In a table that exists only its own keys compare: a long common prefix is no likeness.
    table = ".".join(plain[:-1])
    if not table or table.removesuffix(".*") in keys:
        siblings = {str(found[-1]): found for found in keys.values() if found[:-1] == plain[:-1]}
        close = difflib.get_close_matches(plain[-1], siblings, n=1)
        if close:
            return _with_indices(siblings[close[0]], wanted)
    else:
        close = difflib.get_close_matches(".".join(plain), keys, n=1, cutoff=0.7)
        if close:
            return _with_indices(keys[close[0]], wanted)
    # The right word, or almost, in the wrong table.
    words = {str(found[-1]) for found in keys.values()}
    close = difflib.get_close_matches(plain[-1], words, n=1, cutoff=0.8)
    named = [found for found in keys.values() if close and found[-1] == close[0]]
    return _with_indices(named[0], wanted) if len(named) == 1 else ""


def _is_within(part: tuple[str, ...], whole: Path) -> bool:
    rest = iter(whole)
    return part[-1] == whole[-1] and all(word in rest for word in part)


def _with_indices(found: Path, wanted: list[str]) -> str:
    indices = iter([part for part in wanted if part.isdecimal()])
    return ".".join(next(indices, "0") if part == "*" else str(part) for part in found)
