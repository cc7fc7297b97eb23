"""Which attention is chosen, why, and what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.packed_attention import tiny_config

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.placement.attention import KNOWN_TYPES, Attention, place_attention
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.placement import place
from minidistill.placement.planner import load_models

Configure = Callable[..., Any]
CPU = Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False)
GPU = Machine(gpus=1, bytes=80 * GIB, vllm=True, bf16=True, flash_attn=True)


def chosen(
    configure: Configure, model: Any, *flags: str, machine: Machine = GPU, dtype: str = "bfloat16"
) -> Attention:
    return place_attention(configure(*flags).config, (model,), machine, dtype, 512)


def test_nothing_changes_on_a_cpu(configure: Configure) -> None:
    config = configure().config
    placement = place(config, load_models(config), CPU)
    assert placement.attention == Attention(None, False, "there is no GPU")
    assert placement.attention.text == "sdpa, sequences are padded: there is no GPU"


@pytest.mark.parametrize("kind", sorted(KNOWN_TYPES))
def test_a_gpu_packs_without_a_mask(configure: Configure, kind: str) -> None:
    found = chosen(configure, tiny_config(kind))
    assert (found.implementation, found.packed, found.unpadded) == ("varlen", True, True)
    assert found.text == "varlen, sequences are packed, no mask: 16-bit weights on a GPU"
    fp32 = chosen(configure, tiny_config(kind), dtype="float32")
    assert (fp32.implementation, fp32.packed) == (None, False)
    assert "float32" in fp32.reason


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("gemma2", {"attn_logit_softcapping": None}, "gemma2 models are not known"),
        ("gpt_oss", {}, "gpt_oss models are not known"),
        ("qwen3_next", {}, "qwen3_next models are not known"),
        ("mistral", {"sliding_window": 500}, "a window of 500 tokens"),
        ("phi3", {"sliding_window": 500}, "a window of 500 tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
         "a window of 64 tokens"),
    ],
)  # fmt: skip
def test_other_attention_stays_padded(
    configure: Configure, kind: str, more: dict[str, Any], reason: str
) -> None:
    model = tiny_config(kind, **more)
    found = chosen(configure, model)
    assert (found.implementation, found.packed) == (None, False)
    assert reason in found.reason
    with pytest.raises(UserError, match=reason) as caught:
        chosen(configure, model, "--model.attn", "varlen")
    assert caught.value.exit_code == EXIT_USAGE
    # flash_attention_2 has windows and caps, but packing is not tried with them
    flash = chosen(configure, model, "--model.attn", "flash_attention_2")
    assert (flash.implementation, flash.packed) == ("flash_attention_2", False)


@pytest.mark.parametrize("size", [20, 264])
def test_heads_that_the_kernel_does_not_take_stay_padded(configure: Configure, size: int) -> None:
    model = tiny_config("llama", head_dim=size)
    found = chosen(configure, model)
    assert (found.implementation, found.packed) == (None, False)
    assert f"heads of size {size}" in found.reason
    assert chosen(configure, model, "--model.attn", "varlen").unpadded  # if it is asked for


def test_windows_that_hold_every_sequence_do_not_matter(configure: Configure) -> None:
    for model in (
        tiny_config("mistral", sliding_window=512),
        tiny_config("qwen2", sliding_window=64),  # no layer slides
        tiny_config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2),
    ):
        assert chosen(configure, model).unpadded


def test_a_teacher_in_the_trainer_counts(configure: Configure) -> None:
    config = configure().config
    models = (tiny_config("llama"), tiny_config("gemma2"))
    found = place_attention(config, models, GPU, "bfloat16", 512)
    assert not found.unpadded
    assert "gemma2" in found.reason


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--trainer.packing",), ("varlen", True)),
        (("--no-trainer.packing",), (None, False)),
        (("--model.attn", "varlen"), ("varlen", True)),
        (("--model.attn", "sdpa"), ("sdpa", False)),
        (("--model.attn", "sdpa", "--trainer.packing"), ("sdpa", True)),
        (("--model.attn", "eager"), ("eager", False)),
        (("--model.attn", "flash_attention_2"), ("flash_attention_2", True)),
        (("--model.attn", "flash_attention_2", "--no-trainer.packing"),
         ("flash_attention_2", False)),
    ],
    ids=str,
)  # fmt: skip
def test_settings_are_kept(
    configure: Configure, flags: tuple[str, ...], expected: tuple[str | None, bool]
) -> None:
    found = chosen(configure, tiny_config("qwen3"), *flags)
    assert (found.implementation, found.packed) == expected


def test_varlen_can_be_asked_for_on_a_cpu_in_float32(configure: Configure) -> None:
    llama = tiny_config("llama")
    for flags in (("--model.attn", "varlen"), ("--trainer.packing",)):
        assert chosen(configure, llama, *flags, machine=CPU, dtype="float32").unpadded


@pytest.mark.parametrize(
    ("machine", "dtype", "what", "code"),
    [
        (CPU, "float32", "runs on GPUs only", EXIT_ENVIRONMENT),
        (replace(GPU, flash_attn=False), "bfloat16", "is not installed", EXIT_ENVIRONMENT),
        (GPU, "float32", "needs 16-bit weights", EXIT_USAGE),
    ],
)
def test_flash_attention_2_is_refused_before_the_start(
    configure: Configure, machine: Machine, dtype: str, what: str, code: int
) -> None:
    config = configure("--model.attn", "flash_attention_2", "--model.dtype", dtype).config
    with pytest.raises(UserError, match=what) as caught:
        place(config, load_models(config), machine)
    assert caught.value.exit_code == code
    assert "model.attn" in str(caught.value.where)


def test_varlen_and_padding_contradict_each_other(configure: Configure) -> None:
    with pytest.raises(UserError, match="pads them") as caught:
        chosen(configure, tiny_config("llama"), "--model.attn", "varlen", "--no-trainer.packing")
    assert caught.value.exit_code == EXIT_USAGE


def test_this_machine_has_flash_attn_if_its_package_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib import metadata

    assert Machine.local().flash_attn is False
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.0" if name == "flash-attn" else "0")
    assert Machine.local().flash_attn is True
    assert Machine.imagined(1, 80 * GIB).flash_attn is True


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_models_that_cap_their_scores_run_eager(configure: Configure, machine: Machine) -> None:
    found = chosen(configure, tiny_config("gemma2"), machine=machine)
    assert (found.implementation, found.packed) == ("eager", False)
    assert "gemma2 models cap their attention scores" in found.reason
    assert chosen(configure, tiny_config("gemma2"), "--trainer.packing").packed
