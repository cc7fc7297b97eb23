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
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.placement import vllm_version
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.placement import EnginePlacement, place
from minidistill.placement.planner import load_models

Configure = Callable[..., Any]
CPU = Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False)


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


def test_an_adapter_on_the_embedding_is_refused(
    configure: Configure, version: Callable[[str | None], None]
) -> None:
    version("0.32.0")
    targets = ("--trainer.model.lora.target_modules", "q_proj,embed_tokens")
    config = configure("--inference.engine", "vllm", *targets).config
    with pytest.raises(UserError, match="the embedding embed_tokens cannot be sent") as caught:
        options(config)
    assert "embedded" in caught.value.fix


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
