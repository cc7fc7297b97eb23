"""Plans: parameter counts, what fits, and changes that make a configuration fit."""

from __future__ import annotations

from typing import Any

import pytest
from support.paths import ROOT

from minidistill.config import load_config
from minidistill.config.schema import LoraConfig
from minidistill.errors import UserError
from minidistill.models.hub import load_model_config
from minidistill.placement.engine_memory import CONTEXT, ENGINE_TOKENS, GRAPHS
from minidistill.placement.estimate import Plan
from minidistill.placement.limits import (
    SYNC_CHUNK_BYTES,
    completion_tokens,
    kv_bytes_per_token,
)
from minidistill.placement.machine import Machine
from minidistill.placement.model_shape import read_shape
from minidistill.placement.planner import load_models, plan
from minidistill.placement.render import flags as as_flags

CONFIGS = ROOT / "configs"
SMALL = str(CONFIGS / "sokoban-qwen3-0.6b.toml")
LARGE = str(CONFIGS / "sokoban-qwen3-4b.toml")
GIB = 1 << 30
FOUR = "--inference_gpu_ids 0,1 --teacher_gpu_ids 2 --trainer_gpu_ids 3 --inference.parallel.dp 2"
SAMPLED = "--trainer.loss.estimator sampled"
EIGHT = (
    "--inference_gpu_ids 0 1 --teacher_gpu_ids 2 3 --trainer_gpu_ids 4 5 6 7 "
    "--inference.parallel.tp 2 --teacher_inference.parallel.tp 2"
)

pytestmark = pytest.mark.usefixtures("offline")


def planned(file: str, gpus: int, gib: float, flags: str = "") -> Plan:
    config = load_config([file, *flags.split()]).config
    machine = Machine(gpus, int(gib * GIB), vllm=gpus > 0, bf16=gpus > 0)
    return plan(config, load_models(config, shipped=True), machine)


# -- counting ----------------------------------------------------------------------------------


def test_counts_of_qwen3_4b() -> None:
    model = load_model_config(load_config([LARGE]).config, shipped=True)
    shape = read_shape(model)
    embedding = 151936 * 2560
    attention = 2560 * (4096 + 2 * 1024) + 4096 * 2560 + 2 * 128
    layer = attention + 3 * 2560 * 9728 + 2 * 2560
    assert shape.parameters == embedding + 36 * layer + 2560 == 4_022_468_096
    assert (shape.embedding, shape.head) == (embedding, 0)  # tied
    assert kv_bytes_per_token(model, 2) == 2 * 36 * 8 * 128 * 2 == 147_456
    assert kv_bytes_per_token(model, 2, tp=2) == 147_456 // 2
    assert kv_bytes_per_token(model, 2, tp=16) == 147_456 // 8  # heads are not split
    linears = 2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)
    assert shape.adapter(LoraConfig()) == 36 * 16 * linears == 33_030_144
    assert shape.adapter(LoraConfig(rank=8, target_modules=["q_proj"])) == 36 * 8 * (2560 + 4096)
    two = LoraConfig(
        rank=8,
        target_modules=["q_proj", "k_proj"],
        rank_pattern={r"layers\.[0-9]\.self_attn\.q": 2},
    )
    plain = 36 * 8 * (2560 + 4096 + 2560 + 1024)
    assert shape.adapter(two) == plain, "the pattern ends within a name"
    ends = two.model_copy(update={"rank_pattern": {r"layers\.[0-9]\.self_attn\.q_proj": 2}})
    assert shape.adapter(ends) == plain - 10 * 6 * (2560 + 4096)
    dora = two.model_copy(update={"use_dora": True})
    assert shape.adapter(dora) == plain + 36 * (4096 + 1024)


def test_counts_of_qwen3_06b() -> None:
    shape = read_shape(load_model_config(load_config([SMALL]).config, shipped=True))
    layer = 1024 * (2048 + 2 * 1024) + 2048 * 1024 + 2 * 128 + 3 * 1024 * 3072 + 2 * 1024
    assert shape.parameters == 151936 * 1024 + 28 * layer + 1024 == 596_049_920


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("gpt_neox", {"rotary_pct": 1.0}),
    ],
)
def test_counts_of_other_architectures_match_built_models(
    kind: str, settings: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes, **settings)
    model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    untied = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert shape.head == (3200 if untied else 0)
    head = model.get_output_embeddings()
    assert len(shape.linears) == len(
        [m for m in model.modules() if type(m).__name__ == "Linear" and m is not head]
    )


def test_a_missing_model_is_refused() -> None:
    config = load_config([LARGE, "--model.name", "no/such-model"]).config
    with pytest.raises(UserError, match="cannot load the model 'no/such-model'"):
        load_model_config(config, shipped=True)


# -- what fits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "gpus", "gib", "flags"),
    [
        (SMALL, 1, 24, ""),
        (SMALL, 2, 24, ""),
        (LARGE, 4, 80, ""),
        (LARGE, 8, 80, ""),
        (LARGE, 4, 80, FOUR),
        (LARGE, 8, 80, EIGHT),
        (str(CONFIGS / "sokoban.toml"), 0, 4, ""),
    ],
)
def test_shipped_configurations_fit_their_machines(
    file: str, gpus: int, gib: float, flags: str
) -> None:
    result = planned(file, gpus, gib, flags)
    assert result.fits, result.problems
    assert result.change == {}
    assert all(device.peak <= device.usable for device in result.devices)


def test_four_gpus_have_a_teacher_engine() -> None:
    result = planned(LARGE, 4, 80, SAMPLED)
    assert result.placement.teacher_engine is not None
    assert result.placement.teacher_engine.gpus == (1,)
    assert result.placement.teacher.estimator.name == "sampled"
    assert result.placement.teacher_text == "in an engine of its own"


def test_the_cache_gets_the_rest_of_an_engines_memory() -> None:
    result = planned(LARGE, 4, 80, SAMPLED)
    student = result.devices[0].phases["sampling"]
    free = int(0.9 * 80 * GIB) - 2 * 4_022_468_096 - 2 * 33_030_144 - GRAPHS
    free -= ENGINE_TOKENS * 2 * (9728 + 2560) * 2 + 2 * 4 * 256 * 151936
    assert student["student: keys and values"] == free
    assert result.sequences["student"] == free // (147_456 * 2048) == 225
    assert planned(LARGE, 4, 80, FOUR).sequences["student"] == 2 * 225


def test_contexts_and_syncs_are_outside_an_engines_share() -> None:
    """vLLM measures the GPU after its context exists; the driver copies the adapter there."""
    sampling = planned(LARGE, 4, 80).devices[0].phases["sampling"]
    outside = {
        "student: CUDA context": CONTEXT,
        "student: received weights": 2 * 33_030_144,
        "trainer: sync buffer": 2 * 33_030_144,
        "trainer: the driver's CUDA context": CONTEXT,
    }
    assert outside.items() <= sampling.items()
    assert sum(sampling.values()) == int(0.9 * 80 * GIB) + sum(outside.values())


def test_a_sync_of_every_weight_is_a_phase() -> None:
    """A chunk is sent and copied; the embedding, the largest layer, is built again."""
    phases = planned(LARGE, 4, 80, "--no-trainer.model.lora").devices[0].phases
    embedding = 2 * 151936 * 2560
    chunk = max(embedding, SYNC_CHUNK_BYTES)
    assert phases["syncing"] == phases["sampling"] | {
        "student: received weights": chunk,
        "student: rebuilt layer": embedding,
    }
    assert phases["sampling"]["trainer: sync buffer"] == chunk


def test_tensor_parallel_engines_split_weights_and_cache() -> None:
    one, two = planned(LARGE, 8, 80, SAMPLED), planned(LARGE, 8, 80, EIGHT)
    weights = [p.devices[0].phases["sampling"]["student: weights"] for p in (one, two)]
    assert weights[1] * 2 == weights[0]
    assert two.sequences["student"] > one.sequences["student"]


def test_a_shared_gpu_must_fit_the_largest_phase() -> None:
    result = planned(SMALL, 1, 24)
    (device,) = result.devices
    assert set(device.phases) == {"sampling", "training", "evaluating"}
    # asleep, an engine keeps its context and its graphs
    for phase in ("training", "evaluating"):
        parts = device.phases[phase]
        asleep = {name for name in parts if name.startswith("student: ")}
        assert asleep == {"student: CUDA context", "student: CUDA graphs"}
    assert device.peak == max(sum(parts.values()) for parts in device.phases.values())
    assert not any("activations" in n for n in device.phases["sampling"] if n[:7] == "trainer")
    assert not any("keys" in name for name in device.phases["training"])


def test_full_fine_tuning_splits_weights_and_optimizer_over_the_ranks() -> None:
    four = planned(LARGE, 4, 80, "--no-trainer.model.lora")
    parts = four.devices[-1].phases["training"]
    count = 4_022_468_096
    assert four.placement.sharded
    assert parts["trainer: weights"] == count  # 2 bytes each, on two ranks
    assert parts["trainer: gradients"] == 2 * count  # 4 bytes each
    assert parts["trainer: head gradient"] == 2 * 4 * 151936 * 2560
    assert parts["trainer: optimizer"] == (8 + 4) * count // 2  # moments and fp32 copies
    assert not planned(LARGE, 4, 80).placement.sharded


def test_a_frozen_teacher_in_the_trainer_is_a_second_copy_under_full_fine_tuning() -> None:
    flags = "--no-trainer.model.lora --trainer.loss.estimator full"
    parts = planned(LARGE, 4, 80, flags).devices[-1].phases["training"]
    assert parts["trainer: reference copy"] == parts["trainer: weights"]
    live = f"{flags} --orchestrator.teacher_model.update live"
    training = planned(LARGE, 4, 80, live).devices[-1].phases["training"]
    assert "trainer: reference copy" not in training


def test_two_engines_on_one_gpu_split_its_memory() -> None:
    result = planned(LARGE, 2, 80, "--no-teacher_inference.share")
    student, teacher = result.placement.student, result.placement.teacher_engine
    assert teacher is not None
    # the student's holds an adapter more, and the rest is divided equally
    assert (student.memory_share, teacher.memory_share) == (0.45, 0.44)
    assert min(result.sequences.values()) > 0


def test_an_engine_without_room_for_a_sequence_does_not_fit() -> None:
    result = planned(LARGE, 4, 80, "--inference.gpu_memory_utilization 0.1")
    assert not result.fits
    assert "student's engine has no room for one sequence of 2048 tokens" in result.problems[0]


def test_a_micro_batch_on_a_cpu_is_small_or_one_group() -> None:
    file = str(CONFIGS / "sokoban.toml")
    placement = planned(file, 0, 8).placement
    assert (placement.micro_batch_tokens, placement.ac_freq) == (1024, 0)
    eight = "--orchestrator.rollouts_per_example 8 --seq_len 1000"
    placement = planned(file, 0, 8, f"{eight} --orchestrator.sampling.max_tokens 500").placement
    assert (placement.micro_batch_tokens, placement.ac_freq) == (500 + 8 * 500, 0)
    # memory for less: fewer tokens come before recomputed layers
    tight = planned(file, 0, 0.15, f"{eight} --orchestrator.sampling.max_tokens 500").placement
    assert (tight.micro_batch_tokens, tight.ac_freq) == (2250, 0)


# -- changes -----------------------------------------------------------------------------------

NO_AC = "--no-trainer.model.ac"
CHANGES = [
    (LARGE, 4, 80, f"{NO_AC} --trainer.micro_batch_tokens 16384",
     {"trainer.micro_batch_tokens": 8192}),
    (SMALL, 1, 24, "--inference.gpu_memory_utilization 0.9",
     {"inference.gpu_memory_utilization": "auto"}),
    (LARGE, 1, 24, f"{NO_AC} --seq_len 4096 --inference.gpu_memory_utilization 0.9",
     {"trainer.model.ac.freq": 1, "inference.gpu_memory_utilization": "auto"}),
    (LARGE, 2, 40, f"{NO_AC} --trainer.micro_batch_tokens 8192",
     {"trainer.micro_batch_tokens": 4096}),
    (LARGE, 2, 24, "--trainer.model.ac false --seq_len 4096", {"trainer.model.ac.freq": 1}),
    (LARGE, 2, 40, "--no-trainer.model.lora --orchestrator.teacher_model.update live",
     {"trainer.model.lora.rank": 16}),
    (LARGE, 1, 24, "--model.name Qwen/Qwen3-8B", {"inference.engine": "embedded"}),
    (LARGE, 4, 6, "", None),
    (str(CONFIGS / "sokoban.toml"), 0, 0.155, f"{NO_AC} --trainer.micro_batch_tokens 16384",
     {"trainer.micro_batch_tokens": 4096}),
]  # fmt: skip


@pytest.mark.parametrize(("file", "gpus", "gib", "flags", "change"), CHANGES)
def test_the_smallest_change_makes_it_fit(
    file: str, gpus: int, gib: float, flags: str, change: dict[str, Any] | None
) -> None:
    result = planned(file, gpus, gib, flags)
    assert not result.fits
    assert result.change == change
    if change is not None:
        # as flags on the command line
        assert planned(file, gpus, gib, f"{flags} {as_flags(change)}").fits


def test_planning_does_not_query_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def refuse(*args: Any) -> None:
        raise AssertionError("planning queried a device")

    for name in ("device_count", "get_device_properties", "is_bf16_supported", "init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert planned(LARGE, 8, 80).fits


def test_environment_arguments_reach_the_environment() -> None:
    from minidistill.envs.registry import load_environments

    for file in (SMALL, LARGE):
        config = load_config([file]).config
        (environment,) = load_environments(config.orchestrator.env, "").values()
        content = environment.train[0].messages[0]["content"]
        assert "Symbols:" in content  # the rules are in the prompt


def test_eager_attention_on_packed_sequences_scores_every_pair_of_a_row() -> None:
    flags = "--model.attn eager --trainer.packing true --trainer.micro_batch_tokens 16384"
    device = planned(LARGE, 4, 80, flags).devices[-1]
    scores = 32 * 16384 * 16384 * (4 + 2)  # fp32 weights, and their copies in bfloat16
    assert device.phases["training"]["trainer: activations"] > scores


@pytest.mark.parametrize("game", ["sokoban-turns", "frozen-lake"])
@pytest.mark.parametrize(("overlay", "gpus"), [("", 4), ("", 2), ("@ qwen3-1.7b", 1)])
def test_conversations_fit_on_cards_of_80_gb(game: str, overlay: str, gpus: int) -> None:
    flags = overlay.replace("@ ", f"@ {CONFIGS}/overlays/") + (".toml" if overlay else "")
    file = str(CONFIGS / f"{game}-qwen3-4b.toml")
    fits = planned(file, gpus, 80, flags)
    assert fits.fits
    config = load_config([file]).config
    assert completion_tokens(config, fits.placement.max_length) == 5 * 1024


def test_the_tokens_of_a_conversation_are_those_of_its_turns() -> None:
    """And of a single turn `max_tokens`, whatever else an environment takes."""
    for flags, expected in (
        ((), 1024),
        (("--orchestrator.env.0.args.max_turns", "3"), 2047),
        (("--orchestrator.env.0.args.max_turns", "1"), 1024),
        (("--orchestrator.env.0.args.max_turns", "many"), 1024),
    ):
        config = load_config([LARGE, *flags]).config
        assert completion_tokens(config, 2048) == expected
