"""Short runs of tiny models of many architectures, checked in float64 by transformers and peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import ARCHITECTURES, SIBLINGS, TARGETS, build
from support.tiny_runs import train
from support.verification import largest_difference

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, EXIT_USAGE

LIMIT = 1e-5
"""Of the largest difference of a log-prob or a KL from float64, nats."""


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def assert_exact(folder: Path, model: Path) -> float:
    error = max(largest_difference(folder / "run", model, step) for step in (1, 2))
    assert error <= LIMIT
    return error


@pytest.mark.parametrize("name", [slow(n) if n in SIBLINGS else n for n in ARCHITECTURES])
def test_a_runs_figures_are_the_models(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model = build(name, tmp_path)
    targets = ("--trainer.model.lora.target_modules", TARGETS[name]) if name in TARGETS else ()
    assert train(tmp_path, model, *targets) == EXIT_OK
    record_property("largest difference", assert_exact(tmp_path, model))


@pytest.mark.parametrize("name", [slow("gpt_neox"), slow("gemma3"), "mixtral"])
def test_packed_sequences_of_models_that_keep_them_apart(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    assert train(tmp_path, model, "--trainer.packing") == EXIT_OK
    assert_exact(tmp_path, model)


@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
@pytest.mark.parametrize("name", ["opt", "bloom", "lfm2", slow("qwen3_5")])
def test_packing_that_leaks_is_refused(
    name: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(name, tmp_path)
    flags = ("--trainer.packing", "--model.dtype", dtype)
    assert train(tmp_path, model, *flags) == EXIT_ENVIRONMENT
    assert "packed sequences read each other in this model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gpt2", slow("opt"), slow("bloom")])
@pytest.mark.parametrize(
    "flags", [("--trainer.model.ac",), ("--trainer.model.lora.dropout", "0.3")]
)
def test_the_models_own_dropout_is_off(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """A new adapter changes nothing, so that its own dropout shows from the second step on."""
    model = build(name, tmp_path)
    assert train(tmp_path, model, *flags) == EXIT_OK
    assert largest_difference(tmp_path / "run", model, 1) <= LIMIT
    trained = largest_difference(tmp_path / "run", model, 2)
    assert trained <= LIMIT if "dropout" not in flags[0] else trained > 100 * LIMIT


def test_an_adapter_on_the_head_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llama", tmp_path)
    flags = ("--trainer.model.lora.target_modules", "q_proj,lm_head")
    assert train(tmp_path, model, *flags) == EXIT_USAGE
    assert "the LM head would get an adapter" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_an_adapter_on_the_embedding(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    flags = ("--trainer.model.lora.target_modules", "q_proj,embed_tokens")
    assert train(tmp_path, model, *flags) == EXIT_OK
    assert_exact(tmp_path, model)


def test_a_recurrent_teacher_of_a_student_with_attention(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    teacher = build("lfm2", tmp_path / "teacher")
    flags = ("--teacher_inference.model.name", str(teacher))
    assert train(tmp_path, build("llama", tmp_path), *flags) == EXIT_OK


REMOTE = {
    "configuration_x.py": """
from transformers import LlamaConfig
class XConfig(LlamaConfig):
    model_type = "xllama"
""",
    "modeling_x.py": """
from transformers import LlamaForCausalLM
from .configuration_x import XConfig
class XForCausalLM(LlamaForCausalLM):
    config_class = XConfig
""",
}
AUTO = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}


def test_a_model_with_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llama", tmp_path)
    for name, text in REMOTE.items():
        (model / name).write_text(text)
    file = model / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "xllama", "auto_map": AUTO}
    file.write_text(json.dumps(config))
    assert train(tmp_path, model) == EXIT_USAGE
    assert "custom code" in capsys.readouterr().err
    assert train(tmp_path, model, "--model.trust_remote_code") == EXIT_OK


def test_an_adapter_of_a_multimodal_model_is_a_start(tmp_path: Path) -> None:
    model = build("gemma3_vision", tmp_path)
    assert train(tmp_path, model) == EXIT_OK
    (tmp_path / "again").mkdir()
    flags = ("--trainer.model.lora.init", str(tmp_path / "run"))
    assert train(tmp_path / "again", model, *flags) == EXIT_OK


def test_attention_that_leaves_the_models_cap_out_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("gemma2", tmp_path)
    assert train(tmp_path, model, "--model.attn", "sdpa") == EXIT_ENVIRONMENT
    assert "sdpa attention is not this model's" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_padding_that_changes_a_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bias before a convolution makes padding more than zeros."""
    model = build("lfm2_conv_bias", tmp_path)
    weights = load_file(model / "model.safetensors")
    large = {name: 30 * w if name.endswith("in_proj.bias") else w for name, w in weights.items()}
    assert any(not torch.equal(large[name], weights[name]) for name in weights)
    save_file(large, model / "model.safetensors", {"format": "pt"})
    assert train(tmp_path, model) == EXIT_OK
    assert "prompts of different lengths are sampled from one after the other" in (
        capsys.readouterr().out
    )
    assert_exact(tmp_path, model)
