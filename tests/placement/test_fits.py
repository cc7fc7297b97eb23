"""With nothing set: which models fit which machines, and that `run` decides what `plan` shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from minidistill import cli
from minidistill.config import LoadedConfig, load_config
from minidistill.driver.prepare import prepare
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.models.registry import BUILT_IN, SHIPPED_CONFIGS
from minidistill.placement.estimate import Plan
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from minidistill.placement.render import flags as as_flags
from minidistill.reporting.run_directory import RunDirectory

MODELS = (
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "meta-llama/Llama-3.2-3B",
    "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3-8B",
)
MACHINES = ((1, 24), (1, 48), (1, 80), (2, 24), (2, 80), (4, 80), (8, 80))
PARAMETERS = {
    "Qwen/Qwen3-1.7B": 1_720_574_976,  # tied
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,  # tied
}

pytestmark = pytest.mark.usefixtures("offline")


def machine(gpus: int, gib: float) -> Machine:
    return Machine(gpus, int(gib * GIB), vllm=gpus > 0, bf16=gpus > 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models as folders with the shipped tokenizer, and a configuration that sets nothing."""
    folder = tmp_path_factory.mktemp("fits")
    for name in MODELS:
        shutil.copytree(BUILT_IN["tiny-sokoban"], folder / name)
        shutil.copy(SHIPPED_CONFIGS[name], folder / name / "config.json")
    lines = [json.dumps({"prompt": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "run.toml").write_text(
        '[orchestrator.teacher_model]\ncontext = "Think."\n[[orchestrator.env]]\nid = "jsonl"\n'
        f'args = {{ path = "{folder}/prompts.jsonl", reward = "exact" }}\n'
    )
    return folder


def configured(folder: Path, model: str, *flags: str) -> LoadedConfig:
    return load_config([str(folder / "run.toml"), "--model.name", model, *flags])


def prepared(
    folder: Path, loaded: LoadedConfig, on: Machine, patch: pytest.MonkeyPatch
) -> Plan | UserError:
    """The plan of a run on this machine, or how it is refused. Nothing is started or written."""
    patch.setattr("minidistill.driver.prepare.Machine.local", lambda: on)
    # the folders have the shipped model's weights, which are not those of their configurations
    patch.setattr("minidistill.driver.prepare.check_weights", lambda config: None)
    path = folder / "runs" / "never"
    try:
        plan = prepare(loaded, RunDirectory(path), resume=False).plan
    except UserError as error:
        plan = error
    assert not path.exists()
    return plan


@pytest.mark.parametrize("model", MODELS)
def test_a_run_decides_what_plan_shows(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpus, gib in MACHINES:
        on = machine(gpus, gib)
        shown = plan_run(configured(folder, model), on, shipped=True)
        decided = prepared(folder, configured(folder, str(folder / model)), on, monkeypatch)
        if isinstance(decided, UserError):
            assert not shown.fits
            assert decided.exit_code == EXIT_ENVIRONMENT
            assert all(problem in decided.what for problem in shown.problems)
            assert as_flags(shown.change or {}) in decided.fix
            continue
        assert shown.fits
        first, second = shown.placement, decided.placement
        assert first.choices == second.choices
        assert first.micro_batch_tokens == second.micro_batch_tokens
        assert first.ac_freq == second.ac_freq
        assert first.student.memory_share == second.student.memory_share
        assert first.student.max_length == second.student.max_length == 2049
        assert first.trainer_gpus == second.trainer_gpus
        assert shown.devices == decided.devices
        assert all(device.peak <= device.usable for device in shown.devices)
        assert min(shown.sequences.values()) >= 1


def cell(plan: Plan) -> str:
    if not plan.fits:
        return "—"
    tokens = f"{plan.placement.micro_batch_tokens // 1024}k"
    recomputed = " ac" if plan.placement.ac_freq else ""
    return f"{plan.placement.student.memory_share:.2f}, {tokens}{recomputed}"


def test_the_documented_table(folder: Path) -> None:
    """docs/plan.md has this table. If it differs, copy it from the assertion's message."""
    rows = [
        "| | " + " | ".join(f"{gpus} × {gib}" for gpus, gib in MACHINES) + " |",
        "|---" * (len(MACHINES) + 1) + "|",
    ]
    for model in MODELS:
        plans = [plan_run(configured(folder, model), machine(*m), shipped=True) for m in MACHINES]
        rows.append(f"| {model.partition('/')[2]} | {' | '.join(map(cell, plans))} |")
    documented = (ROOT / "docs" / "plan.md").read_text()
    assert "\n".join(rows) in documented, "the table is now:\n" + "\n".join(rows)


def test_the_promises_of_one_gpu(folder: Path) -> None:
    """Without checkpointing, and with room for a batch of 64 in the engine."""
    for model, gib in (("Qwen/Qwen3-0.6B", 24), ("Qwen/Qwen3-4B-Instruct-2507", 80)):
        plan = plan_run(configured(folder, model), machine(1, gib), shipped=True)
        assert plan.fits
        assert plan.placement.micro_batch_tokens >= 4096
        assert plan.placement.ac_freq == 0
        assert plan.sequences["student"] >= 64
        assert plan.warnings == ()


@pytest.mark.parametrize("model", PARAMETERS)
def test_counts_of_the_shipped_configurations(folder: Path, model: str) -> None:
    plan = plan_run(configured(folder, model), machine(8, 80), shipped=True)
    assert plan.shape.parameters == PARAMETERS[model]
    assert (plan.shape.head == 0) == (model != "Qwen/Qwen3-8B")


FOUR_B = "Qwen/Qwen3-4B-Instruct-2507"
REFUSED = [
    ((1, 24), ("--inference.gpu_memory_utilization", "0.9"), "GPU 0: sampling needs",
     "--inference.gpu_memory_utilization auto"),
    ((1, 80), ("--trainer.micro_batch_tokens", "32768", "--no-trainer.model.ac"),
     "GPU 0: training needs", "--trainer.micro_batch_tokens"),
    ((1, 24), ("--no-trainer.model.ac", "--seq_len", "4096"), "GPU 0: training needs",
     "--trainer.model.ac.freq 1"),
    ((0, 4), (), "CPU: sampling needs", "no change of settings was found"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "flags", "problem", "fix"), REFUSED)
def test_a_set_value_that_does_not_fit_is_refused_with_the_change_that_plan_prints(
    folder: Path,
    size: tuple[int, int],
    flags: tuple[str, ...],
    problem: str,
    fix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on = machine(*size)
    error = prepared(folder, configured(folder, str(folder / FOUR_B), *flags), on, monkeypatch)
    assert isinstance(error, UserError)
    assert error.exit_code == EXIT_ENVIRONMENT
    assert problem in error.what
    assert fix in error.fix
    if flags:
        assert flags[0].replace("--no-", "--") in error.where.replace("--no-", "--")
    argv = ["plan", str(folder / "run.toml"), "--model.name", FOUR_B, *flags]
    sizes = ["--gpus", str(size[0]), "--gpu-memory", str(size[1])]
    assert cli.main([*argv, *sizes]) == EXIT_ENVIRONMENT
    printed = " ".join(capsys.readouterr().out.split())
    assert f"does not fit; {error.fix}" in printed
    assert all(text in printed for text in error.what.partition(": ")[2].split("; "))


def test_values_that_are_set_are_kept(folder: Path) -> None:
    flags = ("--inference.gpu_memory_utilization", "0.3", "--trainer.micro_batch_tokens", "5000",
             "--trainer.model.ac.freq", "2")  # fmt: skip
    plan = plan_run(configured(folder, "Qwen/Qwen3-0.6B", *flags), machine(1, 80), shipped=True)
    placement = plan.placement
    assert plan.fits
    assert placement.student.memory_share == 0.3
    assert (placement.micro_batch_tokens, placement.ac_freq) == (5000, 2)
    set_ones = {c.key for c in placement.choices if c.reason == "set in the configuration"}
    assert set_ones == {
        "inference.gpu_memory_utilization",
        "trainer.micro_batch_tokens",
        "trainer.model.ac",
    }


def test_a_smaller_gpu_counts_if_it_is_used(folder: Path) -> None:
    mixed = Machine(2, 80 * GIB, vllm=True, bf16=True, each=(80 * GIB, 24 * GIB))
    model = "Qwen/Qwen3-1.7B"
    both = plan_run(configured(folder, model), mixed, shipped=True)
    assert {device.bytes for device in both.devices} == {24 * GIB}
    ids = ("--inference_gpu_ids", "0", "--trainer_gpu_ids", "0")
    first = plan_run(configured(folder, model, *ids), mixed, shipped=True)
    assert [device.bytes for device in first.devices] == [80 * GIB]


def test_the_total_memory_of_each_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[int, Any] = {0: 80 * GIB, 1: 24 * GIB}

    class Properties:
        def __init__(self, index: int) -> None:
            self.total_memory, self.name = sizes[index], f"card {index}"

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", Properties)
    local = Machine.local()
    assert (local.each, local.card) == ((80 * GIB, 24 * GIB), "card 0")
    assert local.smallest([0]) == 80 * GIB
    assert local.smallest([0, 1]) == 24 * GIB


def test_a_teacher_engine_beside_the_students_gets_what_it_needs(folder: Path) -> None:
    """8 B as the teacher of 0.6 B on the same GPU: half of it each would not do."""
    flags = ("--teacher_inference.model.name", "Qwen/Qwen3-8B")
    plan = plan_run(configured(folder, "Qwen/Qwen3-0.6B", *flags), machine(2, 24), shipped=True)
    assert plan.fits, plan.problems
    teacher = plan.placement.teacher_engine
    assert teacher is not None
    assert teacher.gpus == plan.placement.student.gpus == (0,)
    assert teacher.memory_share > 2 * plan.placement.student.memory_share
