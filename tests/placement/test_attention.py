"""Which attention is chosen, why, and what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.packed_attention import tiny_config

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.placement.attention import KNOWN_TYPES, Attention, Layout, place_attention
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


def test_the_shipped_model_shares_prompts_on_a_cpu(configure: Configure) -> None:
    config = configure().config
    found = place(config, load_models(config), CPU).attention
    assert found == Attention("varlen", True, "llama models attend causally to all tokens")
    assert found.text == (
        "varlen, sequences are packed, prompts computed once: "
        "llama models attend causally to all tokens"
    )


@pytest.mark.parametrize("kind", sorted(KNOWN_TYPES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_models_that_attend_causally_share_prompts(
    configure: Configure, kind: str, dtype: str
) -> None:
    found = chosen(configure, tiny_config(kind), dtype=dtype)
    assert (found.implementation, found.packed, found.layout) == ("varlen", True, Layout.SHARED)
    assert found.reason == f"{kind} models attend causally to all tokens"


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


def test_windows_that_hold_every_sequence_do_not_matter(configure: Configure) -> None:
    for model in (
        tiny_config("mistral", sliding_window=512),
        tiny_config("qwen2", sliding_window=64),  # no layer slides
        tiny_config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2),
    ):
        assert chosen(configure, model).shares_prompts


def test_a_teacher_in_the_trainer_counts(configure: Configure) -> None:
    config = configure().config
    models = (tiny_config("llama"), tiny_config("gemma2"))
    found = place_attention(config, models, GPU, "bfloat16", 512)
    assert not found.shares_prompts
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


def test_varlen_can_be_asked_for(configure: Configure) -> None:
    llama = tiny_config("llama")
    for flags in (("--model.attn", "varlen"), ("--trainer.packing",)):
        assert chosen(configure, llama, *flags, machine=CPU, dtype="float32").shares_prompts


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
