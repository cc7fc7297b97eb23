"""A model is loaded exactly, or refused with the names of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.lab import cpu_placement
from support.paths import SOKOBAN
from support.tiny_models import build

from minidistill.config import load_config
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.models.hub import load_tokenizer
from minidistill.models.registry import BUILT_IN
from minidistill.models.weights import check_weights, load_weights, refuse_adapters
from minidistill.placement.model_shape import Shapes
from minidistill.placement.planner import load_models
from minidistill.trainer.loading import load_policy

UP = "model.layers.1.mlp.up_proj.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[dict[str, Any]], Any]


def rewrite(change: Change) -> Callable[[Path], None]:
    def rewritten(folder: Path) -> None:
        weights = load_file(folder / FILE)
        change(weights)
        save_file(weights, folder / FILE, {"format": "pt"})

    return rewritten


def replace_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def replaced(folder: Path) -> None:
        (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))

    return replaced


def shard(folder: Path) -> None:
    """In two files, of which the second is missing."""
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    by_name = {key: names[i % 2] for i, key in enumerate(weights)}
    save_file({k: w for k, w in weights.items() if by_name[k] == names[0]}, folder / names[0])
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": by_name}))


def truncate_bin(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / FILE), path)
    (folder / FILE).unlink()
    path.write_bytes(path.read_bytes()[:-2000])


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "missing": (rewrite(lambda w: w.pop(UP)), f"lacks 1 weight ({UP}) of LlamaForCausalLM"),
    "no head": (rewrite(lambda w: w.pop("lm_head.weight", None)), ""),
    "no embedding": (rewrite(lambda w: w.pop("model.embed_tokens.weight")), "lacks"),
    "unexpected": (
        rewrite(lambda w: w.update(extra=torch.zeros(2))),
        "has 1 weight (extra) that LlamaForCausalLM does not have",
    ),
    "more layers than its configuration": (fewer_layers, "(model.layers.1.input_layernorm.weight"),
    "another shape": (
        rewrite(lambda w: w.update({UP: torch.zeros(8, 4)})), f"{UP}: (8, 4), not (",
    ),
    "truncated": (replace_bytes(lambda b: b[:-100]), f"{FILE} is damaged"),
    "empty": (replace_bytes(lambda b: b""), f"{FILE} is damaged"),
    "garbage": (replace_bytes(lambda b: b"garbage!" + b[8:]), f"{FILE} is damaged"),
    "pointer": (
        replace_bytes(lambda b: b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS",
    ),
    "absent shard": (shard, "names files that are not there: model-00002-of-00002"),
    "truncated .bin": (truncate_bin, "pytorch_model.bin is damaged: its end is missing"),
    "no weights": (lambda folder: (folder / FILE).unlink(), "no file named"),
    "a watermark": (
        lambda folder: (folder / "generation_config.json").write_text(
            '{"watermarking_config": 5}'
        ),
        "AttributeError",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(BUILT_IN["tiny-sokoban"], tmp_path / "model")
    return tmp_path / "model"


def loaded(name: Path | str, *flags: str) -> Any:
    return load_config([SOKOBAN, "--model.name", str(name), *flags])


@pytest.mark.parametrize("name", [n for n in DAMAGES if n != "no head"])
def test_what_is_wrong_is_named(name: str, folder: Path) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError) as caught:
        check_weights(loaded(folder).config)
    assert message in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.where == "model.name"
    assert caught.value.fix


def test_a_tied_head_is_not_missing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    DAMAGES["no head"][0](folder)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    check_weights(loaded(folder).config)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match="lm_head"):
        check_weights(loaded(folder).config)


@pytest.mark.parametrize(
    ("name", "layer", "buffers"),
    [
        ("gptj", "transformer.h.0.attn", ("bias", "masked_bias", "scale_attn")),
        ("gpt_bigcode", "transformer.h.1.attn", ("bias", "masked_bias")),
        ("gpt_neox", "gpt_neox.layers.0.attention", ("bias", "masked_bias", "rotary_emb.inv_freq")),
        ("llama", "model.layers.1.self_attn", ("rotary_emb.inv_freq", "rotary_emb.cos_cached")),
        ("gemma", "model", ("causal_mask", "position_ids")),
    ],
)
def test_masks_and_positions_of_old_checkpoints_are_no_weights(
    name: str, layer: str, buffers: tuple[str, ...], tmp_path: Path
) -> None:
    model = build(name, tmp_path)
    old = {f"{layer}.{buffer}": torch.ones(2) for buffer in buffers}
    rewrite(lambda w: w.update(old))(model)
    check_weights(loaded(model).config)
    real = f"{layer}.extra.weight"
    rewrite(lambda w: w.update({real: torch.ones(2)}))(model)
    with pytest.raises(UserError) as caught:
        check_weights(loaded(model).config)
    assert f"has 1 weight ({real}) that" in str(caught.value)


def test_a_bias_of_a_layer_is_a_weight(folder: Path) -> None:
    """Even of a layer that is named as attention is elsewhere."""
    for name in ("model.layers.0.self_attn.q_proj.bias", "lm_head.bias"):
        rewrite(lambda w, name=name: w.update({name: torch.zeros(2)}))(folder)
    with pytest.raises(UserError, match="has 2 weights"):
        check_weights(loaded(folder).config)


def test_a_teachers_weights_are_checked_too(folder: Path) -> None:
    """Whoever loads them: here only an engine would."""
    DAMAGES["missing"][0](folder)
    with pytest.raises(UserError, match="lacks 1 weight") as caught:
        check_weights(loaded("tiny-sokoban", "--teacher_inference.model.name", str(folder)).config)
    assert caught.value.where == "teacher_inference.model.name"


def test_a_checked_model_is_not_read(folder: Path) -> None:
    model = load_weights(loaded(folder).config, str(folder), dtype="auto", device_map="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_trainer_loads_nothing_that_is_not_in_the_files(folder: Path) -> None:
    """Also if the files change after the check."""
    run = loaded(folder)
    DAMAGES["missing"][0](folder)
    with pytest.raises(UserError, match="lacks 1 weight"):
        load_policy(run.config, load_tokenizer(run.config), cpu_placement(run))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, path / "adapter_model.safetensors")
    return path


def test_an_adapter_in_place_of_a_model(adapter: Path) -> None:
    with pytest.raises(UserError, match="is an adapter of 'some/base', not a model") as caught:
        refuse_adapters(loaded(adapter).config)
    assert caught.value.exit_code == EXIT_USAGE
    assert f'trainer.model.lora.init = "{adapter}"' in caught.value.fix
    with pytest.raises(UserError, match="is an adapter") as caught:
        refuse_adapters(
            loaded("tiny-sokoban", "--teacher_inference.model.name", str(adapter)).config
        )
    assert caught.value.where == "teacher_inference.model.name"
    assert "lora.init" not in caught.value.fix


def test_a_model_beside_an_adapter(adapter: Path, folder: Path) -> None:
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    with pytest.raises(UserError, match="holds a model and an adapter") as caught:
        refuse_adapters(loaded(folder).config)
    assert "trainer.model.lora.init" in caught.value.fix
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": []}')
    with pytest.raises(UserError, match="is an adapter of 'some/base', not a model"):
        refuse_adapters(loaded(folder).config)


def test_a_sound_model_passes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a word."""
    config = loaded(folder).config
    refuse_adapters(config)
    check_weights(config)
    assert capfd.readouterr().err == ""


def test_a_teacher_that_generates_no_text_is_named_as_the_teacher(tmp_path: Path) -> None:
    """By the plan too, which reads its configuration alone."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    config = loaded("tiny-sokoban", "--teacher_inference.model.name", str(tmp_path)).config
    for check in (check_weights, lambda config: Shapes.of(load_models(config))):
        with pytest.raises(UserError, match="t5 models do not generate text") as caught:
            check(config)
        assert caught.value.where == "teacher_inference.model.name"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON") as caught:
        load_models(config)
    assert caught.value.where == "teacher_inference.model.name"


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "gemma2"])
def test_a_folder_without_a_model_or_a_tokenizer_says_so(
    model_type: str | None, tmp_path: Path
) -> None:
    """Of Qwen's and Gemma's transformers makes a tokenizer of a few special tokens."""
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    missing = "tokenizer" if model_type else "model"
    with pytest.raises(UserError, match=f"has no {missing}") as caught:
        load_tokenizer(loaded(tmp_path).config)
    assert (caught.value.where, caught.value.exit_code) == ("model.name", EXIT_USAGE)


@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": 0.5},
        {"hidden_act": "*"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**400},
        {"model_type": "qwen3", "num_hidden_layers": 10**9},
        {"extra_config": {"num_experts": 10**9}},
        {"num_hidden_layers": 0},
        {"vocab_size": -1},
        {"eos_token_id": 10**400},
        {"eos_token_id": [0, -(10**400)]},
        {"output_attentions": True},
        {"return_dict": False},
        {"auto_map": "../../etc/passwd"},
        {"auto_map": ["AutoModelForCausalLM"]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_configuration_of_which_no_model_can_be_made(
    change: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILT_IN["tiny-sokoban"], folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError) as caught:
        cpu_placement(load_config([SOKOBAN, "--model.name", str(folder)]))
    assert caught.value.where == "model.name"
