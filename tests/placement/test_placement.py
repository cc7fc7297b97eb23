"""Engines, dtypes, lengths and memory in a placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from minidistill.placement.estimate import estimate
from minidistill.placement.limits import CPU_BLOCK, CPU_CACHE_BYTES, MAX_SEQUENCES, cpu_cache_bytes
from minidistill.placement.machine import GIB, GPU_BYTES, Machine
from minidistill.placement.model_shape import Shapes
from minidistill.placement.placement import Models, Placement, place
from minidistill.placement.planner import load_models

Configure = Callable[..., Any]
CPU = Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False)
FOUR_GPUS = Machine(gpus=4, bytes=80 * GIB, vllm=True, bf16=True)
VLLM = ("--inference.engine", "vllm")
SAMPLED = ("--trainer.loss.estimator", "sampled")
STUDENT_SERVERS = ("--inference.server_urls", '["http://one:1","http://two:1"]')
TEACHER_SERVER = ("--teacher_inference.server_urls", '["http://teacher:1"]')


def placed(configure: Configure, machine: Machine, *flags: str) -> Placement:
    config = configure(*flags).config
    return place(config, load_models(config), machine)


def with_limit(models: Models, *, student: int, teacher: int) -> Models:
    """The models with these limits on sequence lengths."""
    configs = [
        models.student.to_dict() | {"max_position_embeddings": n} for n in (student, teacher)
    ]
    return Models(*(type(models.student).from_dict(fields) for fields in configs))


@pytest.mark.parametrize(
    ("machine", "flags", "kind"),
    [
        (CPU, (), "embedded"),
        (CPU, VLLM, "vllm"),
        (CPU, STUDENT_SERVERS, "server"),
        (FOUR_GPUS, (), "vllm"),
        (replace(FOUR_GPUS, vllm=False), (), "embedded"),
        (FOUR_GPUS, ("--inference.engine", "embedded"), "embedded"),
        (FOUR_GPUS, STUDENT_SERVERS, "server"),
    ],
)
def test_the_kind_of_the_students_engine(
    configure: Configure, machine: Machine, flags: tuple[str, ...], kind: str
) -> None:
    student = placed(configure, machine, *flags).student
    assert student.kind.name == kind
    assert student.in_trainer == (kind == "embedded")
    assert bool(student.gpus) == (kind == "vllm" and machine.gpus > 0)
    assert student.urls == (("http://one:1", "http://two:1") if kind == "server" else ())


@pytest.mark.parametrize(
    ("machine", "flags", "text", "kind"),
    [
        (CPU, (), "in the trainer: the embedded engine is the trainer's own model", None),
        (CPU, TEACHER_SERVER, "on a server of its own", "server"),
        (CPU, (*VLLM, *SAMPLED), "in the student's engine", None),
        (CPU, (*VLLM, "--no-teacher_inference.share"), "in an engine of its own", "vllm"),
        (CPU, (*STUDENT_SERVERS, *SAMPLED), "in the student's engine", None),
        (FOUR_GPUS, (), "in the trainer: its logits give the exact gradient", None),
        (FOUR_GPUS, SAMPLED, "in an engine of its own", "vllm"),
        (FOUR_GPUS, (*SAMPLED, "--teacher_inference.share"), "in the student's engine", None),
        (FOUR_GPUS, (*STUDENT_SERVERS, *TEACHER_SERVER), "on a server of its own", "server"),
    ],
)
def test_where_the_teacher_is_scored(
    configure: Configure, machine: Machine, flags: tuple[str, ...], text: str, kind: str | None
) -> None:
    placement = placed(configure, machine, *flags)
    engine = placement.teacher_engine
    assert placement.teacher_text == text
    assert (engine.kind.name if engine else None) == kind
    assert (placement.teacher.scorer == "trainer") == text.startswith("in the trainer")


def test_a_teacher_that_the_running_engine_cannot_score_stays_in_the_trainer(
    configure: Configure,
) -> None:
    loaded = configure("--trainer.loss.estimator", "top_k")
    planned = place(loaded.config, load_models(loaded.config), FOUR_GPUS)
    assert (planned.teacher.scorer, planned.teacher_engine is None) == ("engine", False)
    run = planned.with_teacher_in_trainer(loaded.config)
    assert (run.teacher.scorer, run.teacher.estimator.name) == ("trainer", "top_k")
    assert run.teacher_engine is None
    assert "V2 runner" in run.teacher_text
    assert (run.student, run.trainer_gpus) == (planned.student, planned.trainer_gpus)


def test_replicas_on_a_cpu(configure: Configure) -> None:
    flags = (*VLLM, "--inference.parallel.dp", "3", "--inference.parallel.tp", "2")
    student = placed(configure, CPU, *flags).student
    assert (student.dp, student.tp, student.replicas) == (3, 2, ((), (), ()))


@pytest.mark.parametrize(
    ("machine", "flags", "dtype"),
    [
        (CPU, (), "float32"),
        (CPU, ("--model.dtype", "bfloat16"), "bfloat16"),
        (FOUR_GPUS, (), "bfloat16"),
        (replace(FOUR_GPUS, bf16=False), (), "float32"),
        (FOUR_GPUS, ("--model.dtype", "float16"), "float16"),
    ],
)
def test_engines_and_trainer_have_one_dtype(
    configure: Configure, machine: Machine, flags: tuple[str, ...], dtype: str
) -> None:
    placement = placed(configure, machine, *SAMPLED, *flags)
    engines = [placement.student, placement.teacher_engine]
    assert placement.dtype == dtype
    assert {engine.dtype for engine in engines if engine is not None} == {dtype}


@pytest.mark.parametrize(
    ("student", "teacher", "longest", "student_engine", "teacher_engine"),
    [
        (4096, 4096, 300, 301, 301),  # scoring requests one more token
        (300, 4096, 300, 300, 301),
        (200, 4096, 200, 200, 201),
        (4096, 200, 200, 201, 200),
    ],
)
def test_lengths_stay_within_seq_len_and_the_models_limits(
    configure: Configure,
    student: int,
    teacher: int,
    longest: int,
    student_engine: int,
    teacher_engine: int,
) -> None:
    config = configure(*SAMPLED, "--seq_len", "300").config
    models = with_limit(load_models(config), student=student, teacher=teacher)
    placement = place(config, models, FOUR_GPUS)
    assert placement.max_length == longest
    assert placement.student.max_length == student_engine
    assert placement.teacher_engine is not None
    assert placement.teacher_engine.max_length == teacher_engine


def test_two_engines_on_a_gpu_share_its_memory(configure: Configure) -> None:
    two = replace(FOUR_GPUS, gpus=2)
    placement = placed(configure, two, "--no-teacher_inference.share")
    assert placement.teacher_engine is not None
    assert placement.student.gpus == placement.teacher_engine.gpus
    shares = placement.student.memory_share, placement.teacher_engine.memory_share
    assert shares == (0.45, 0.45)


def test_an_engine_takes_its_share_even_if_no_sequence_fits(configure: Configure) -> None:
    config = configure("--seq_len", "20000000").config
    models = with_limit(load_models(config), student=10**9, teacher=10**9)
    small = replace(FOUR_GPUS, bytes=8 * GIB)
    plan = estimate(config, Shapes.of(models), models, small)
    assert any("no room for one sequence of 20000000 tokens" in text for text in plan.problems)
    sampling = plan.devices[0].phases["sampling"]
    assert sampling["student: keys and values"] > 0
    outside = ("student: CUDA context", "student: received weights")
    budget = [s for n, s in sampling.items() if n.startswith("student") and n not in outside]
    assert sum(budget) == int(plan.placement.student.memory_share * small.bytes)


def test_the_trainer_holds_no_cache_for_servers(configure: Configure) -> None:
    for machine in (CPU, FOUR_GPUS):
        for flags, holds in ((("--inference.engine", "embedded"), True), (STUDENT_SERVERS, False)):
            config = configure(*flags).config
            models = load_models(config)
            plan = estimate(config, Shapes.of(models), models, machine)
            sampling = (device.phases.get("sampling", {}) for device in plan.devices)
            parts = {name for phase in sampling for name in phase}
            assert any("keys and values" in name for name in parts) == holds


def test_the_cpu_cache_is_bounded() -> None:
    two_blocks = 2 * CPU_BLOCK * 10_000
    assert cpu_cache_bytes(10_000, CPU_BLOCK + 1) == MAX_SEQUENCES * two_blocks
    assert cpu_cache_bytes(10_000, 2 * CPU_BLOCK) == MAX_SEQUENCES * two_blocks
    assert cpu_cache_bytes(1_000_000, 64) == CPU_CACHE_BYTES
    one_sequence = 1_000_000 * 40_000
    assert one_sequence < cpu_cache_bytes(1_000_000, 40_000) < 1.01 * one_sequence


def test_a_machine_to_plan_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    four = Machine.imagined(4, None)
    assert (four.gpus, four.bytes, four.vllm, four.bf16) == (4, GPU_BYTES, True, True)
    assert Machine.imagined(4, 24 * GIB).bytes == 24 * GIB
    cpu = Machine.imagined(None, None)
    assert (cpu.gpus, cpu.vllm, cpu.bf16, cpu.device_type) == (0, False, False, "cpu")
    assert cpu.bytes == Machine.local().bytes
