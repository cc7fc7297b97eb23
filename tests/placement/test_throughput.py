"""The expected time of a step, idle GPUs, and layouts that are faster."""

from __future__ import annotations

import pytest
from support.paths import ROOT

from minidistill.config import load_config
from minidistill.placement.estimate import Plan
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import load_models, plan
from minidistill.placement.throughput import Timing, card_of

LARGE = str(ROOT / "configs" / "sokoban-qwen3-4b.toml")
SMALL = str(ROOT / "configs" / "sokoban-qwen3-0.6b.toml")
SAMPLED = "--trainer.loss.estimator sampled"

pytestmark = pytest.mark.usefixtures("offline")


def planned(gpus: int, flags: str = "", file: str = LARGE, gib: int = 80, card: str = "") -> Plan:
    config = load_config([file, *flags.split()]).config
    machine = Machine(gpus, gib * GIB, vllm=gpus > 0, bf16=gpus > 0, card=card)
    return plan(config, load_models(config, shipped=True), machine)


def timed(gpus: int, flags: str = "") -> Timing:
    timing = planned(gpus, flags).timing
    assert timing is not None
    return timing


@pytest.mark.parametrize(
    ("card", "gib", "name", "size", "named"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100", 80, True),
        ("NVIDIA H200", 139.8, "H200", 141, True),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100", 40, True),
        ("NVIDIA A100 80GB PCIe", 79.1, "A100", 80, True),
        ("NVIDIA GeForce RTX 4090", 23.5, "RTX 4090", 24, True),
        ("NVIDIA L4", 22.0, "L4", 24, True),
        ("NVIDIA L40S", 44.4, "L40S", 48, True),
        ("", 80, "H100", 80, False),
        ("", 24, "RTX 4090", 24, False),
        ("some other card", 48, "L40S", 48, False),
    ],
)
def test_a_card_is_known_by_its_name_or_assumed_by_its_size(
    card: str, gib: float, name: str, size: int, named: bool
) -> None:
    machine = Machine(1, int(gib * GIB), vllm=True, bf16=True, card=card)
    found, by_name = card_of(machine)
    assert (found.name, found.gib, by_name) == (name, size, named)


def test_the_phases_by_hand() -> None:
    """Qwen3-4B, teacher in the trainer: two GPUs sample, two train. Completions of 512 tokens."""
    timing = timed(4)
    body, head = 4_022_468_096 - 151936 * 2560, 151936 * 2560
    prompts, completions = 16 * 1024, 128 * 1024  # of 16 groups; half of the completions is there
    share = (prompts + completions / 2) / (prompts + completions)
    flops = ((prompts + completions) * body + completions * head) * share
    assert timing.teacher == pytest.approx(2 * flops / (0.5 * 989e12) / 2)
    assert timing.train == pytest.approx(4 * flops / (0.35 * 989e12) / 2)
    bandwidth = 0.6 * 3.35e12
    weights = 1024 * 2 * 4_022_468_096 / bandwidth  # read once in each of 1024 steps
    cache = 64 * 512 * (1024 + 256) * 147_456 / bandwidth
    prompts = 2 * (body + head) * 8 * 1024 / (0.5 * 989e12)  # eight groups of eight
    assert timing.sample == pytest.approx(weights + cache + prompts)


def test_half_of_the_shorter_phases_hides_behind_the_busiest_gpu() -> None:
    timing = timed(4)
    trainer = timing.teacher + timing.train
    shorter, longer = sorted((timing.sample, trainer))
    assert timing.step == pytest.approx(longer + shorter / 2)
    assert timing.idle == pytest.approx(
        dict.fromkeys((0, 1), 1 - timing.sample / timing.step)
        | dict.fromkeys((2, 3), 1 - trainer / timing.step)
    )


def test_one_gpu_is_never_idle_and_async_overlaps_completely() -> None:
    one = timed(1)
    assert one.step == pytest.approx(one.sample + one.teacher + one.train)
    assert one.idle == pytest.approx({0: 0})
    overlapped = timed(4, "--schedule async")
    trainer = overlapped.teacher + overlapped.train
    assert overlapped.step == pytest.approx(max(overlapped.sample, trainer))
    assert min(overlapped.idle.values()) == pytest.approx(0)


def test_an_engine_for_the_teacher_is_idle_most_of_the_time() -> None:
    """An estimate by hand for four H100 and 500 tokens: 8 s of sampling, 2.3 s of scoring."""
    timing = timed(4, SAMPLED)
    assert timing.sample == pytest.approx(8, rel=0.4)
    assert timing.teacher == pytest.approx(2.3, rel=0.4)
    assert timing.idle[1] > 0.75
    assert timing.mean_idle > 0.5


@pytest.mark.parametrize("gpus", [4, 8])
def test_the_shipped_configuration_has_the_fastest_layout_under_sync(gpus: int) -> None:
    result = planned(gpus)
    assert result.timing is not None
    schedules = [layout.settings.get("schedule") for layout in result.faster]
    assert schedules == ["async"] * len(schedules)
    slower = planned(gpus, SAMPLED)
    settings = [dict(layout.settings) for layout in slower.faster]
    assert {"trainer.loss.estimator": "full"} in settings
    seconds = [layout.seconds for layout in slower.faster]
    assert seconds == sorted(seconds)
    assert result.timing.step in seconds


def test_where_there_is_nothing_to_say() -> None:
    assert planned(0, file=str(ROOT / "configs" / "sokoban.toml")).timing is None
    assert planned(4, "--inference.engine embedded").timing is None
    assert planned(2).faster == ()
    too_large = planned(1, gib=8)
    assert not too_large.fits
    assert too_large.timing is None
