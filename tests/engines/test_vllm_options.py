"""Which engine a run takes, and what is said where vLLM cannot be had. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minidistill.engines.launch import start_engines
from minidistill.engines.vllm import options as vllm_options
from minidistill.engines.vllm.options import build_options, wants_vllm
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.models.hub import load_model_config
from minidistill.placement.gpus import partition
from minidistill.placement.teacher import decide

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("asked", "device", "version", "expected"),
    [
        ("auto", CPU, "0.32.0", False),
        ("auto", CUDA, "0.32.0", True),
        ("auto", CUDA, None, False),
        ("auto", CUDA, "0.11.2", False),
        ("embedded", CUDA, "0.32.0", False),
        ("vllm", CPU, None, True),
    ],
)
def test_auto_is_vllm_where_there_is_a_gpu_and_one_that_fits(
    configure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    device: torch.device,
    version: str | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(vllm_options, "installed", lambda: version)
    config = configure("--inference.engine", asked).config
    assert wants_vllm(config, device) is expected


@pytest.mark.parametrize(
    ("version", "what"),
    [(None, "not installed"), ("0.31.9", "0.31.9"), ("1.2", "1.2 is installed")],
)
def test_a_missing_or_other_vllm_is_an_error_with_the_fix(
    configure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    what: str,
) -> None:
    monkeypatch.setattr(vllm_options, "installed", lambda: version)
    config = configure("--inference.engine", "vllm").config
    model = load_model_config(config)
    teaching = decide(config, vllm=True, token_ids=False)
    parts = partition(config, 0, teaching, None)
    with pytest.raises(UserError, match=what) as caught:
        start_engines(config, CPU, parts, teaching, (model, model), 256, print)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "embedded" in caught.value.fix


def test_options_of_a_run(configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_options, "installed", lambda: "0.32.0")
    config = configure("--inference.engine", "vllm", "--trainer.model.lora.rank", "17").config
    options = build_options(config, CPU, load_model_config(config), 256)
    assert options.arguments["max_lora_rank"] == 32, "the least that vLLM takes and holds 17"
    assert options.adapter["r"] == 17
    assert "lm_head" not in options.arguments["lora_target_modules"]
    assert "q_proj" in options.arguments["lora_target_modules"]
    assert options.environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"


def test_options_on_gpus(configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_options, "installed", lambda: "0.32.0")
    config = configure("--inference.engine", "vllm", "--inference.parallel.tp", "2").config
    model = load_model_config(config)
    options = build_options(config, CUDA, model, 256, gpus=(2, 3), share=0.4, sleeps=True)
    assert options.arguments["device_ids"] == [2, 3]
    assert options.arguments["tensor_parallel_size"] == options.workers == 2
    assert options.arguments["gpu_memory_utilization"] == 0.4
    assert options.arguments["enable_sleep_mode"] is options.sleeps is True
    assert "enforce_eager" not in options.arguments


def test_options_without_an_adapter(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight trained, and a teacher's engine that serves the base alone."""
    monkeypatch.setattr(vllm_options, "installed", lambda: "0.32.0")
    for flags, teacher in ((("--no-trainer.model.lora",), False), ((), True)):
        config = configure("--inference.engine", "vllm", *flags).config
        options = build_options(config, CPU, load_model_config(config), 256, teacher=teacher)
        assert not options.adapter
        assert not any("lora" in name for name in options.arguments)
