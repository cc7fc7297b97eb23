"""Settings that are valid alone but contradict each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

from minidistill.config.context_checks import context_problems
from minidistill.config.engine_kinds import ENGINE_KINDS
from minidistill.config.problem import Problem
from minidistill.config.schema import Config, EngineConfig, LossConfig, ParallelConfig
from minidistill.estimators import ESTIMATORS, TeacherNeeds


def contradictions(config: Config) -> Iterator[Problem]:
    """The contradictions in `config`."""
    yield from context_problems(config)
    yield from _objective(config)
    yield from _teachers_samples(config)
    yield from _adapter(config)
    yield from _quantization(config)
    yield from _rollouts(config)
    yield from _environments(config)
    yield from _selection(config)
    yield from _gpus(config)
    yield from _servers(config)


def _objective(config: Config) -> Iterator[Problem]:
    loss, teacher = config.trainer.loss, config.orchestrator.teacher_model
    if loss.teacher_tau == 0 and loss.adv_tau == 0:
        yield Problem(
            "trainer.loss.teacher_tau and trainer.loss.adv_tau are both 0: nothing to learn from",
            "set trainer.loss.teacher_tau above 0 to distill",
            ("trainer.loss.teacher_tau", "trainer.loss.adv_tau"),
        )
    if config.separate_teacher is not None and teacher.update != "frozen":
        yield Problem(
            f"the teacher is another model ({config.separate_teacher}), which training does not "
            f'change, but orchestrator.teacher_model.update = "{teacher.update}"',
            'set update = "frozen", or remove teacher_inference.model.name',
            ("teacher_inference.model.name", "orchestrator.teacher_model.update"),
        )
    if config.orchestrator.buffer.skip_verification and loss.adv_tau != 0:
        yield Problem(
            "orchestrator.buffer.skip_verification = true leaves no reward to weight, "
            f"but trainer.loss.adv_tau = {loss.adv_tau}",
            "set trainer.loss.adv_tau = 0",
            ("orchestrator.buffer.skip_verification", "trainer.loss.adv_tau"),
        )
    if config.trainer.scheduler.min_lr > config.trainer.peak_lr:
        auto = "auto, which is " if config.trainer.optim.lr == "auto" else ""
        yield Problem(
            f"trainer.scheduler.min_lr = {config.trainer.scheduler.min_lr} is above "
            f"trainer.optim.lr = {auto}{config.trainer.peak_lr}",
            "set min_lr to at most lr",
            ("trainer.scheduler.min_lr", "trainer.optim.lr"),
        )


def _teachers_samples(config: Config) -> Iterator[Problem]:
    """What learning from the teacher's samples needs, and what it leaves no use for."""
    loss, key = config.trainer.loss, "orchestrator.sample_from"
    from_teacher = config.orchestrator.sample_from == "teacher"
    masks = ("token_mask_low", "token_mask_high")
    if from_teacher and any(getattr(loss, name) != getattr(LossConfig(), name) for name in masks):
        keys = tuple(f"trainer.loss.{name}" for name in masks)
        yield Problem(
            f'{keys[0]} and {keys[1]} bound ratios, but {key} = "teacher" masks no token: those '
            "that the student finds unlikely are the ones that teach it",
            f'leave them out, or set {key} = "student"',
            (key, *keys),
        )
    estimator = ESTIMATORS.get(loss.estimator)  # None is "auto"
    if estimator is None or not estimator.imitates:
        return
    name = f'trainer.loss.estimator = "{estimator}"'
    if not from_teacher:
        yield Problem(
            f'{name} learns to imitate the samples, but {key} = "student" gives it the student\'s '
            "own",
            f'set {key} = "teacher", or another estimator',
            ("trainer.loss.estimator", key),
        )
    settings = {"adv_tau": loss.adv_tau, "student_tau": loss.student_tau, "kl_clip": loss.kl_clip}
    unused = {k: v for k, v in settings.items() if v not in (0, "auto", "off")}
    if loss.ratio_clip_high != LossConfig().ratio_clip_high:
        unused["ratio_clip_high"] = loss.ratio_clip_high
    offs = {"kl_clip": '"off"', "ratio_clip_high": f"{LossConfig().ratio_clip_high}, its default"}
    for setting, value in unused.items():
        off = offs.get(setting, "0")
        yield Problem(
            f"{name} has one term, -teacher_tau * log π(y), but trainer.loss.{setting} = {value}",
            f"set trainer.loss.{setting} = {off}",
            (f"trainer.loss.{setting}", "trainer.loss.estimator"),
        )


def _adapter(config: Config) -> Iterator[Problem]:
    lora = config.trainer.model.lora
    if lora is False:
        return
    for pattern in lora.rank_pattern:
        try:
            re.compile(pattern)
        except re.error as error:
            yield Problem(
                f"trainer.model.lora.rank_pattern has {pattern!r}, which is not a valid regular "
                f"expression: {error}",
                "write a module's name, the end of one, or a regular expression",
                ("trainer.model.lora.rank_pattern",),
            )
    if not lora.use_dora:
        return
    keys = _vllm_students(config)
    changing = config.orchestrator.teacher_model.update != "frozen"
    if config.teacher_inference.server_urls and changing:
        keys = (*keys, "teacher_inference.server_urls")
    for key in keys:
        yield Problem(
            f"trainer.model.lora.use_dora = true, but {key} serves the adapter with vLLM, which "
            "has no DoRA: it would leave out the trained norms",
            'set inference.engine = "embedded", or use_dora = false',
            ("trainer.model.lora.use_dora", key),
        )


def _quantization(config: Config) -> Iterator[Problem]:
    if config.model.quantization is None:
        return
    name = f'model.quantization = "{config.model.quantization}"'
    if config.trainer.model.lora is False:
        yield Problem(
            f"{name} holds weights that cannot be trained, but trainer.model.lora = false",
            "train an adapter, or leave out model.quantization",
            ("model.quantization", "trainer.model.lora"),
        )
    if config.trainer.shard is True:
        yield Problem(
            f"{name} holds weights that cannot be sharded, but trainer.shard = true",
            "leave out trainer.shard: each rank then holds the 4-bit weights",
            ("model.quantization", "trainer.shard"),
        )
    keys = _vllm_students(config)
    if config.teacher_inference.server_urls and config.separate_teacher is None:
        keys = (*keys, "teacher_inference.server_urls")
    for key in keys:
        yield Problem(
            f"{name} is for the trainer's model, but {key} runs the model in vLLM, with other "
            "weights than those that are trained",
            'set inference.engine = "embedded", or leave out model.quantization',
            ("model.quantization", key),
        )


def _vllm_students(config: Config) -> tuple[str, ...]:
    """The settings that let vLLM sample."""
    if config.inference.server_urls:
        return ("inference.server_urls",)
    engine = ENGINE_KINDS.get(config.inference.engine)  # None is "auto"
    return () if engine is None or engine.in_trainer else ("inference.engine",)


def _rollouts(config: Config) -> Iterator[Problem]:
    orchestrator = config.orchestrator
    size, group = orchestrator.batch_size, orchestrator.rollouts_per_example
    if size % group:
        below, above = size // group * group, (size // group + 1) * group
        multiples = f"{below} or {above}" if below else f"{above}"
        yield Problem(
            f"orchestrator.batch_size = {size} is not a multiple of rollouts_per_example = {group}",
            f"set orchestrator.batch_size to {multiples}",
            ("orchestrator.batch_size", "orchestrator.rollouts_per_example"),
        )
    lengths = {"orchestrator.sampling.max_tokens": orchestrator.sampling.max_tokens}
    if orchestrator.eval is not None:
        eval_length = orchestrator.eval.sampling.max_tokens
        lengths["orchestrator.eval.sampling.max_tokens"] = eval_length or 0
    for key, length in lengths.items():
        if length >= config.seq_len:
            yield Problem(
                f"{key} = {length} leaves no room for a prompt in seq_len = {config.seq_len}",
                f"set {key} below seq_len, which includes context, prompt and completion",
                (key, "seq_len"),
            )
    if orchestrator.teacher_model.eval_baseline and orchestrator.eval is None:
        yield Problem(
            "orchestrator.teacher_model.eval_baseline = true needs [orchestrator.eval]",
            "add [orchestrator.eval], or --orchestrator.eval on the command line",
            ("orchestrator.teacher_model.eval_baseline",),
        )


def _environments(config: Config) -> Iterator[Problem]:
    evaluation = config.orchestrator.eval
    tables = {"orchestrator.env": config.orchestrator.env}
    if evaluation is not None and evaluation.env is not None:
        tables["orchestrator.eval.env"] = evaluation.env
    for table, envs in tables.items():
        for name, count in Counter(env.name for env in envs).items():
            if count > 1:
                index = max(i for i, env in enumerate(envs) if env.name == name)
                yield Problem(
                    f"{count} entries of {table} are named {name!r}",
                    "give each its own `name`",
                    ((*table.split("."), index),),
                )


def _selection(config: Config) -> Iterator[Problem]:
    """What needs evaluations during the run."""
    asked = {
        "ckpt.best": config.ckpt.best is not None,
        "early_stopping": config.early_stopping is not None,
    }
    evaluation = config.orchestrator.eval
    for key in (key for key, is_set in asked.items() if is_set):
        if evaluation is None:
            yield Problem(
                f"{key} compares evaluations, but there is no [orchestrator.eval]",
                "add [orchestrator.eval], or --orchestrator.eval on the command line",
                (key,),
            )
        elif evaluation.interval == 0:
            yield Problem(
                f"{key} compares evaluations during the run, but orchestrator.eval.interval = 0 "
                "evaluates only before and after it",
                "set orchestrator.eval.interval to a number of steps",
                (key, "orchestrator.eval.interval"),
            )


def _gpus(config: Config) -> Iterator[Problem]:
    settings = {
        "inference_gpu_ids": config.inference_gpu_ids,
        "teacher_gpu_ids": config.teacher_gpu_ids,
        "trainer_gpu_ids": config.trainer_gpu_ids,
    }
    gpu_ids = {key: ids for key, ids in settings.items() if ids is not None}
    for key, ids in gpu_ids.items():
        repeated = sorted(gpu for gpu, count in Counter(ids).items() if count > 1)
        if repeated:
            yield Problem(f"{key} names GPU {_list(repeated)} twice", "name each GPU once", (key,))
    for (key, ids), (other_key, other_ids) in combinations(gpu_ids.items(), 2):
        shared = sorted(set(ids) & set(other_ids))
        if shared and set(ids) != set(other_ids):
            yield Problem(
                f"GPU {_list(shared)} is in {key} and {other_key}",
                "give each list its own GPUs, or both the same ones to share them",
                (key, other_key),
            )
    for table, engine, ids_key in (
        ("inference", config.inference, "inference_gpu_ids"),
        ("teacher_inference", config.teacher_inference, "teacher_gpu_ids"),
    ):
        if ids_key in gpu_ids:
            yield from _parallel(table, engine.parallel, ids_key, len(gpu_ids[ids_key]))


def _parallel(table: str, parallel: ParallelConfig, ids_key: str, count: int) -> Iterator[Problem]:
    """Whether an engine's replicas fit the `count` GPUs of `ids_key`."""
    tp, dp = parallel.tp, parallel.dp
    keys = (f"{table}.parallel.tp", f"{table}.parallel.dp", ids_key)
    if dp is not None and dp * tp != count:
        yield Problem(
            f"{table}.parallel needs dp {dp} × tp {tp} = {dp * tp} GPUs, "
            f"but {ids_key} names {count}",
            f"make dp × tp equal to {count}, or name {dp * tp} GPUs",
            keys,
        )
    elif count % tp:
        yield Problem(
            f"{table}.parallel.tp = {tp} does not divide the {count} GPUs of {ids_key}",
            f"set a tp that divides {count}",
            keys,
        )


def _servers(config: Config) -> Iterator[Problem]:
    """What running servers cannot do, and settings that do not apply to them."""
    yield from _engine_settings("inference", config.inference, config.inference_gpu_ids)
    teacher = config.teacher_inference
    yield from _engine_settings("teacher_inference", teacher, config.teacher_gpu_ids)
    if config.inference.server_urls:
        yield from _student_servers(config)
    if config.teacher_inference.server_urls:
        yield from _teacher_servers(config)


def _engine_settings(
    table: str, engine: EngineConfig, gpu_ids: list[int] | None
) -> Iterator[Problem]:
    if not engine.server_urls:
        return
    urls = f"{table}.server_urls"
    unused = [f"{table}.parallel"] if engine.parallel != ParallelConfig() else []
    if engine.gpu_memory_utilization != "auto":
        unused.append(f"{table}.gpu_memory_utilization")
    if gpu_ids is not None:
        unused.append("teacher_gpu_ids" if table == "teacher_inference" else "inference_gpu_ids")
    for key in unused:
        yield Problem(
            f"{key} is for an engine that the run starts, {urls} for running servers",
            f"remove {key}; a server's GPUs are set where it is started",
            (urls, key),
        )


def _student_servers(config: Config) -> Iterator[Problem]:
    urls, teacher = "inference.server_urls", config.teacher_inference
    engine = ENGINE_KINDS.get(config.inference.engine)  # None is "auto"
    if engine is not None and engine.in_trainer:
        yield Problem(
            f'inference.engine = "{engine.name}" samples in the trainer, {urls} on servers',
            "remove one of them",
            ("inference.engine", urls),
        )
    if config.trainer.model.lora is False:
        yield Problem(
            f"trainer.model.lora = false trains every weight, but {urls} cannot receive them: "
            "whole models are sent in memory, on one machine",
            "train an adapter, or let the run start its own engine",
            ("trainer.model.lora", urls),
        )
    estimator = ESTIMATORS.get(config.trainer.loss.estimator)  # None is "auto"
    in_trainer = estimator is not None and estimator.needs is TeacherNeeds.ALL_LOGITS
    needs_engine = (
        config.separate_teacher is not None
        or teacher.share is False
        or config.teacher_gpu_ids is not None
    )
    if needs_engine and not teacher.server_urls and not in_trainer:
        yield Problem(
            f"{urls} serve the student, but the settings give the teacher an engine of its own",
            "set teacher_inference.server_urls to the teacher's servers",
            (urls,),
        )


def _teacher_servers(config: Config) -> Iterator[Problem]:
    urls = "teacher_inference.server_urls"
    estimator = ESTIMATORS.get(config.trainer.loss.estimator)  # None is "auto"
    if estimator is not None and estimator.needs is not TeacherNeeds.SAMPLED_LOGPROBS:
        yield Problem(
            f'trainer.loss.estimator = "{estimator}" needs more from the teacher than '
            f"{urls} give: log-probs of the sampled tokens",
            f'set trainer.loss.estimator = "sampled", or remove {urls}',
            ("trainer.loss.estimator", urls),
        )
    temperature = config.orchestrator.sampling.temperature
    if temperature != 1:
        yield Problem(
            f"{urls} score only at temperature 1, but orchestrator.sampling.temperature = "
            f"{temperature}",
            f"set it to 1, or remove {urls}",
            ("orchestrator.sampling.temperature", urls),
        )
    update = config.orchestrator.teacher_model.update
    if config.trainer.model.lora is False and update != "frozen":
        yield Problem(
            f'orchestrator.teacher_model.update = "{update}" changes every weight of the '
            f"teacher, but {urls} cannot receive them",
            'set update = "frozen", or train an adapter',
            ("orchestrator.teacher_model.update", urls),
        )
    if config.teacher_inference.share:
        yield Problem(
            f"teacher_inference.share = true lets the student's engine serve the teacher, but "
            f"{urls} name the teacher's own servers",
            "remove one of them",
            ("teacher_inference.share", urls),
        )


def _list(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
