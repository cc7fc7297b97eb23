"""What one key alone cannot tell: settings that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from minidistill.config.schema import Config, ParallelConfig
from minidistill.config.schema_tree import Path
from minidistill.estimators import ESTIMATORS, TeacherNeeds


class Problem(NamedTuple):
    """A contradiction: what it is, how to fix it, and the keys it is between."""

    what: str
    fix: str
    keys: tuple[str | Path, ...]


def contradictions(config: Config) -> Iterator[Problem]:
    """Every pair of settings in `config` that cannot hold together."""
    yield from _objective(config)
    yield from _rollouts(config)
    yield from _environments(config)
    yield from _gpus(config)
    yield from _servers(config)


def _objective(config: Config) -> Iterator[Problem]:
    loss, teacher = config.trainer.loss, config.orchestrator.teacher_model
    if not teacher.context.strip():
        yield Problem(
            "orchestrator.teacher_model.context is empty, so there is nothing to distil",
            'set context = "…" or context_file = "…" in [orchestrator.teacher_model]',
            ("orchestrator.teacher_model.context",),
        )
    if loss.teacher_tau == 0 and loss.adv_tau == 0:
        yield Problem(
            "trainer.loss.teacher_tau and trainer.loss.adv_tau are both 0: nothing to learn from",
            "set trainer.loss.teacher_tau above 0 to distil",
            ("trainer.loss.teacher_tau", "trainer.loss.adv_tau"),
        )
    other = config.teacher_inference.model.name
    if other is not None and other != config.model.name and teacher.update != "frozen":
        yield Problem(
            f"the teacher is another model ({other}), which training does not change, but "
            f'orchestrator.teacher_model.update = "{teacher.update}"',
            'take update = "frozen", or leave teacher_inference.model.name out',
            ("teacher_inference.model.name", "orchestrator.teacher_model.update"),
        )
    if config.orchestrator.buffer.skip_verification and loss.adv_tau != 0:
        yield Problem(
            "orchestrator.buffer.skip_verification = true leaves no reward to weigh, "
            f"but trainer.loss.adv_tau = {loss.adv_tau}",
            "set trainer.loss.adv_tau = 0",
            ("orchestrator.buffer.skip_verification", "trainer.loss.adv_tau"),
        )
    if config.trainer.scheduler.min_lr > config.trainer.optim.lr:
        yield Problem(
            f"trainer.scheduler.min_lr = {config.trainer.scheduler.min_lr} is above "
            f"trainer.optim.lr = {config.trainer.optim.lr}",
            "give a min_lr of at most lr",
            ("trainer.scheduler.min_lr", "trainer.optim.lr"),
        )


def _rollouts(config: Config) -> Iterator[Problem]:
    orchestrator = config.orchestrator
    size, group = orchestrator.batch_size, orchestrator.rollouts_per_example
    if size % group:
        below, above = size // group * group, (size // group + 1) * group
        near = f"{below} or {above}" if below else f"{above}"
        yield Problem(
            f"orchestrator.batch_size = {size} is not a multiple of rollouts_per_example = {group}",
            f"set orchestrator.batch_size to {near}",
            ("orchestrator.batch_size", "orchestrator.rollouts_per_example"),
        )
    lengths = {"orchestrator.sampling.max_tokens": orchestrator.sampling.max_tokens}
    if orchestrator.eval is not None:
        in_eval = orchestrator.eval.sampling.max_tokens
        lengths["orchestrator.eval.sampling.max_tokens"] = in_eval or 0
    for key, length in lengths.items():
        if length >= config.seq_len:
            yield Problem(
                f"{key} = {length} leaves no room for a prompt in seq_len = {config.seq_len}",
                f"set {key} below seq_len, which counts context, prompt and completion",
                (key, "seq_len"),
            )
    if orchestrator.teacher_model.eval_baseline and orchestrator.eval is None:
        yield Problem(
            "orchestrator.teacher_model.eval_baseline = true needs [orchestrator.eval]",
            "add [orchestrator.eval], or --orchestrator.eval on the command line",
            ("orchestrator.teacher_model.eval_baseline",),
        )


def _environments(config: Config) -> Iterator[Problem]:
    evals = config.orchestrator.eval
    tables = {"orchestrator.env": config.orchestrator.env}
    if evals is not None and evals.env is not None:
        tables["orchestrator.eval.env"] = evals.env
    for table, envs in tables.items():
        for name, count in Counter(env.name for env in envs).items():
            if count > 1:
                index = max(i for i, env in enumerate(envs) if env.name == name)
                yield Problem(
                    f"{count} entries of {table} are named {name!r}",
                    "give each its own `name`",
                    ((*table.split("."), index),),
                )


def _gpus(config: Config) -> Iterator[Problem]:
    given = {
        key: ids
        for key in ("inference_gpu_ids", "teacher_gpu_ids", "trainer_gpu_ids")
        if (ids := getattr(config, key)) is not None
    }
    for key, ids in given.items():
        twice = sorted(gpu for gpu, count in Counter(ids).items() if count > 1)
        if twice:
            yield Problem(f"{key} names GPU {_list(twice)} twice", "name each GPU once", (key,))
    for (one, ids), (other, others) in combinations(given.items(), 2):
        shared = sorted(set(ids) & set(others))
        if shared and set(ids) != set(others):
            yield Problem(
                f"GPU {_list(shared)} is in {one} and {other}",
                "give each list its own GPUs, or the same ones to both to share them",
                (one, other),
            )
    yield from _parallel("inference", config.inference.parallel, given)
    teacher = config.teacher_inference.parallel
    yield from _parallel("teacher_inference", teacher, given)


def _parallel(
    table: str, parallel: ParallelConfig, given: dict[str, list[int]]
) -> Iterator[Problem]:
    ids_key = "teacher_gpu_ids" if table.startswith("teacher") else "inference_gpu_ids"
    if ids_key not in given:
        return
    count, tp, dp = len(given[ids_key]), parallel.tp, parallel.dp
    keys = (f"{table}.parallel.tp", f"{table}.parallel.dp", ids_key)
    if dp is not None and dp * tp != count:
        yield Problem(
            f"{table}.parallel asks for dp {dp} × tp {tp} = {dp * tp} GPUs, "
            f"but {ids_key} names {count}",
            f"make dp × tp equal to {count}, or name {dp * tp} GPUs",
            keys,
        )
    elif count % tp:
        yield Problem(
            f"{table}.parallel.tp = {tp} does not divide the {count} GPUs of {ids_key}",
            f"take a tp that divides {count}",
            keys,
        )


def _servers(config: Config) -> Iterator[Problem]:
    """What servers that somebody else has started cannot do, or have no use for."""
    tables = {"inference": config.inference, "teacher_inference": config.teacher_inference}
    given = [f"{name}.server_urls" for name, table in tables.items() if table.server_urls]
    students, teachers = "inference.server_urls", "teacher_inference.server_urls"
    for name, table in tables.items():
        url, ids = f"{name}.server_urls", "teacher_gpu_ids" if "_" in name else "inference_gpu_ids"
        if url not in given:
            continue
        useless = [f"{name}.parallel"] if table.parallel != ParallelConfig() else []
        if getattr(config, ids) is not None:
            useless.append(ids)
        for key in useless:
            fix = f"leave {key} out; how a server uses its GPUs is said where it is started"
            yield Problem(f"{key} is for an engine of this run, {url} for servers", fix, (url, key))
    full, teacher = config.trainer.model.lora is False, config.orchestrator.teacher_model
    shared = config.teacher_inference.share
    estimator = ESTIMATORS.get(config.trainer.loss.estimator)  # None is "auto"
    if students in given:
        if config.inference.engine == "embedded":
            yield Problem(
                f'inference.engine = "embedded" samples in the trainer, {students} on servers',
                "leave one of them out",
                ("inference.engine", students),
            )
        if full:
            yield Problem(
                f"trainer.model.lora = false trains every weight, which {students} cannot be sent: "
                "whole models travel in memory, on one machine",
                "train an adapter, or let the run start its own engine",
                ("trainer.model.lora", students),
            )
        other = config.teacher_inference.model.name not in (None, config.model.name)
        apart = other or shared is False or config.teacher_gpu_ids is not None
        in_trainer = estimator is not None and estimator.needs is TeacherNeeds.ALL_LOGITS
        if apart and teachers not in given and not in_trainer:
            yield Problem(
                f"{students} serve the student, and the teacher is asked to be in an engine apart",
                f"give it servers of its own with {teachers}",
                (students,),
            )
    if teachers not in given:
        return
    temperature = config.orchestrator.sampling.temperature
    if estimator is not None and estimator.needs is not TeacherNeeds.SAMPLED_LOGPROBS:
        yield Problem(
            f'trainer.loss.estimator = "{estimator}" needs more of the teacher than '
            f"{teachers} give: log-probs of the sampled tokens",
            f'set trainer.loss.estimator = "sampled", or leave {teachers} out',
            ("trainer.loss.estimator", teachers),
        )
    if temperature != 1:
        yield Problem(
            f"{teachers} score at temperature 1 alone, but orchestrator.sampling.temperature = "
            f"{temperature}",
            f"set it to 1, or leave {teachers} out",
            ("orchestrator.sampling.temperature", teachers),
        )
    if full and teacher.update != "frozen":
        yield Problem(
            f'orchestrator.teacher_model.update = "{teacher.update}" changes every weight of the '
            f"teacher, which {teachers} cannot be sent",
            'set update = "frozen", or train an adapter',
            ("orchestrator.teacher_model.update", teachers),
        )
    if shared:
        yield Problem(
            f"teacher_inference.share = true lets the student's engine serve the teacher, "
            f"{teachers} name its own",
            "leave one of them out",
            ("teacher_inference.share", teachers),
        )


def _list(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
