"""The choice of an engine, vLLM's options, and the error without vLLM. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_models import build
from support.tiny_runs import write_config

from minidistill.config import Config, load_config
from minidistill.engines.launch import EngineLauncher
from minidistill.engines.vllm.options import Options, build_options
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.placement import vllm_version
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.placement import EnginePlacement, place
from minidistill.placement.planner import load_models

Configure = Callable[..., Any]
CPU = Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False)
GPU = Machine(gpus=1, bytes=80 * GIB, vllm=True, bf16=True)


def student(config: Config, machine: Machine = CPU) -> EnginePlacement:
    return place(config, load_models(config), machine).student


def options(config: Config, *, teacher: bool = False) -> Options:
    return build_options(config, student(config), (), teacher=teacher)


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Sets the installed version of vLLM."""
    return lambda number: monkeypatch.setattr(vllm_version, "installed", lambda: number)


@pytest.mark.parametrize(
    ("engine", "gpus", "number", "kind"),
    [
        ("auto", 0, "0.32.0", "embedded"),
        ("auto", 2, "0.32.0", "vllm"),
        ("auto", 2, None, "embedded"),
        ("auto", 2, "0.11.2", "embedded"),
        ("embedded", 2, "0.32.0", "embedded"),
        ("vllm", 0, None, "vllm"),
    ],
)
def test_auto_is_vllm_on_a_gpu_with_a_supported_version(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    version: Callable[[str | None], None],
    engine: str,
    gpus: int,
    number: str | None,
    kind: str,
) -> None:
    version(number)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    gpu = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: gpu)
    config = configure("--inference.engine", engine).config
    assert student(config, Machine.local()).kind.name == kind


@pytest.mark.parametrize(
    ("number", "what"),
    [(None, "not installed"), ("0.31.9", "0.31.9"), ("1.2", "1.2 is installed")],
)
def test_a_missing_or_unsupported_vllm_is_an_error_with_the_fix(
    configure: Configure,
    version: Callable[[str | None], None],
    number: str | None,
    what: str,
) -> None:
    version(number)
    config = configure("--inference.engine", "vllm").config
    launcher = EngineLauncher(config, place(config, load_models(config), CPU), Path("sync"))
    with pytest.raises(UserError, match=what) as caught:
        launcher.start()
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "embedded" in caught.value.fix


def test_options_with_an_adapter(
    configure: Configure, version: Callable[[str | None], None]
) -> None:
    version("0.32.0")
    config = configure("--inference.engine", "vllm", "--trainer.model.lora.rank", "17").config
    engine_options = options(config)
    assert engine_options.arguments["max_lora_rank"] == 32, (
        "the smallest rank that vLLM supports and 17 fits in"
    )
    assert engine_options.adapter["r"] == 17
    assert "lm_head" not in engine_options.arguments["lora_target_modules"]
    assert "q_proj" in engine_options.arguments["lora_target_modules"]
    assert engine_options.arguments["max_model_len"] == config.seq_len + 1
    assert engine_options.environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"


EMBEDDING = ("--trainer.model.lora.target_modules", "q_proj,embed_tokens")


@pytest.mark.parametrize(
    "flags",
    [
        ("--inference.engine", "vllm"),
        ("--inference.server_urls", "http://localhost:1"),
        ("--teacher_inference.server_urls", "http://localhost:1", "--trainer.loss.estimator",
         "sampled", "--orchestrator.teacher_model.update", "ema"),
    ],
)  # fmt: skip
def test_an_adapter_on_the_embedding_is_refused_where_vllm_was_asked_for(
    configure: Configure, flags: tuple[str, ...]
) -> None:
    config = configure(*EMBEDDING, *flags).config
    with pytest.raises(UserError, match="the embedding embed_tokens cannot be sent") as caught:
        place(config, load_models(config), CPU)
    assert (caught.value.exit_code, caught.value.where) == (
        EXIT_USAGE, "trainer.model.lora.target_modules",
    )  # fmt: skip
    assert "embedded" in caught.value.fix


def test_an_adapter_on_the_embedding_is_sampled_from_in_the_trainer(configure: Configure) -> None:
    """Where `auto` would prefer vLLM, and the reason is said."""
    config = configure(*EMBEDDING).config
    placement = place(config, load_models(config), GPU)
    assert placement.student.in_trainer
    reason = "an adapter on the embedding embed_tokens cannot be sent to vLLM"
    assert placement.student.reason == reason
    assert placement.warnings == (f"the embedded engine samples: {reason}",)
    others = configure("--trainer.model.lora.target_modules", "q_proj,o_proj").config
    placement = place(others, load_models(others), GPU)
    assert (placement.student.kind.name, placement.student.reason) == ("vllm", "")


@pytest.mark.parametrize(
    ("targets", "last_parts"),
    [
        ("q_proj", {"q_proj"}),
        ("self_attn.q_proj,down_proj", {"q_proj", "down_proj"}),
        ("model.layers.0.self_attn.k_proj,layers.1.mlp.up_proj", {"k_proj", "up_proj"}),
    ],
)
def test_vllm_is_told_the_last_parts_of_the_layers_names(
    configure: Configure,
    version: Callable[[str | None], None],
    targets: str,
    last_parts: set[str],
) -> None:
    """It wraps a layer whose last part is named, and so leaves out adapters of all others."""
    version("0.32.0")
    flags = ("--inference.engine", "vllm", "--trainer.model.lora.target_modules", targets)
    engine_options = options(configure(*flags).config)
    assert set(engine_options.arguments["lora_target_modules"]) == last_parts
    assert set(engine_options.adapter["target_modules"]) == last_parts


def test_a_multimodal_model_is_served_for_text_alone(
    version: Callable[[str | None], None], tmp_path: Path
) -> None:
    version("0.32.0")
    path = write_config(tmp_path, build("gemma3_vision", tmp_path))
    engine_options = options(load_config([path, "--inference.engine", "vllm"]).config)
    assert engine_options.arguments["language_model_only"] is True
    targets = set(engine_options.arguments["lora_target_modules"])
    assert targets == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }, "the vision tower has others"  # fmt: skip


@pytest.mark.parametrize(
    ("name", "needs"), [("gemma3_vision", True), ("qwen3_5", True), ("qwen3_next", False)]
)
def test_a_multimodal_family_without_torchvision(name: str, needs: bool, tmp_path: Path) -> None:
    """vLLM's modules of such models do not import then, and `auto` is the embedded engine."""
    path = write_config(tmp_path, build(name, tmp_path))
    without = replace(GPU, torchvision=False)
    auto, vllm = (load_config([path, "--inference.engine", e]).config for e in ("auto", "vllm"))
    assert student(vllm, GPU).kind.name == student(auto, GPU).kind.name == "vllm"
    if not needs:
        assert student(vllm, without).kind.name == student(auto, without).kind.name == "vllm"
        return
    with pytest.raises(UserError, match="vLLM needs the package torchvision") as caught:
        student(vllm, without)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    engine = student(auto, without)
    assert engine.in_trainer
    assert "torchvision" in engine.reason


@pytest.mark.parametrize(("name", "caches"), [("llama", True), ("falcon_h1", False)])
def test_recurrent_states_are_not_cached_on_a_cpu(
    version: Callable[[str | None], None], tmp_path: Path, name: str, caches: bool
) -> None:
    version("0.32.0")
    targets = ("--trainer.model.lora.target_modules", "q_proj")
    path = write_config(tmp_path, build(name, tmp_path))
    config = load_config([path, "--inference.engine", "vllm", *targets]).config
    assert options(config).arguments["enable_prefix_caching"] is caches
    on_gpu = build_options(config, student(config, GPU), (0,), teacher=False)
    assert on_gpu.arguments["enable_prefix_caching"] is True


def test_options_with_ranks_by_layer(
    configure: Configure, version: Callable[[str | None], None]
) -> None:
    version("0.32.0")
    flags = ("--trainer.model.lora.rank_pattern", "{ q_proj = 33, k_proj = 4 }")
    flags = ("--inference.engine", "vllm", *flags, "--trainer.model.lora.use_rslora")
    engine_options = options(configure(*flags).config)
    assert engine_options.arguments["max_lora_rank"] == 64
    assert engine_options.adapter["rank_pattern"] == {"q_proj": 33, "k_proj": 4}
    assert engine_options.adapter["use_rslora"] is True


def test_options_on_gpus(configure: Configure, version: Callable[[str | None], None]) -> None:
    version("0.32.0")
    config = configure("--inference.engine", "vllm", "--inference.parallel.tp", "2").config
    engine = replace(student(config), gpus=(2, 3), memory_share=0.4, sleeps=True)
    engine_options = build_options(config, engine, (2, 3), teacher=False)
    assert engine_options.arguments["device_ids"] == [2, 3]
    assert engine_options.arguments["tensor_parallel_size"] == engine_options.workers == 2
    assert engine_options.arguments["gpu_memory_utilization"] == 0.4
    assert engine_options.arguments["enable_sleep_mode"] is engine_options.sleeps is True
    assert "enforce_eager" not in engine_options.arguments


def test_options_without_an_adapter(
    configure: Configure, version: Callable[[str | None], None]
) -> None:
    """For full fine-tuning, and for a teacher's engine that serves only the base."""
    version("0.32.0")
    for flags, teacher in ((("--no-trainer.model.lora",), False), ((), True)):
        engine_options = options(
            configure("--inference.engine", "vllm", *flags).config, teacher=teacher
        )
        assert not engine_options.adapter
        assert not any("lora" in name for name in engine_options.arguments)
