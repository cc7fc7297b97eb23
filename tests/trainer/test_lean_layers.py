"""Layers that train with less memory: the outputs and gradients of peft's and transformers'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.packed_attention import tiny_config, tiny_model

from minidistill.config.schema import LoraConfig
from minidistill.models.auto import decoder_layers
from minidistill.trainer import lean_layers
from minidistill.trainer.adapter import add_adapter
from minidistill.trainer.lean_layers import LeanLinear, LeanMlp, LeanNorm, make_lean
from minidistill.trainer.modes import checkpoint_activations, set_dropout

IDS = torch.randint(2, 50, (3, 11), generator=torch.Generator().manual_seed(0))


def adapted_model(kind: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A tiny model with an adapter that is not zero."""
    base = tiny_model(tiny_config(kind), "sdpa", dtype)
    model = add_adapter(LoraConfig(rank=3, **lora), base, dtype, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.3 * noise.to(dtype))
    set_dropout(model, bool(lora.get("dropout")))
    return model


def lean(model: Any) -> Any:
    made = copy.deepcopy(model)
    make_lean(made)
    return made


def kinds(model: Any) -> dict[type, int]:
    """How many modules are lean, by their kind."""
    modules = list(model.modules())
    return {k: sum(isinstance(m, k) for m in modules) for k in (LeanLinear, LeanMlp, LeanNorm)}


def losses_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)  # of dropout
    logits = model(input_ids=IDS).logits
    losses = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    (losses * torch.linspace(-1, 2, losses.numel()).view_as(losses)).sum().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(got: Any, want: Any, rtol: float) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=rtol)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert gradient.norm() > 0, name
        assert (got[1][name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize(
    ("kind", "norms"), [("llama", 5), ("qwen2", 5), ("qwen3", 9), ("mistral", 5), ("gemma", 0)]
)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["up_proj"]])
def test_losses_and_gradients_are_those_of_the_plain_layers(
    kind: str, norms: int, targets: Any
) -> None:
    model = adapted_model(kind, target_modules=targets)
    made = lean(model)
    linears = 14 if targets == "all-linear" else 2 * len(targets)
    # gemma's norms add 1 to their weight, and its MLP has another activation
    mlps = 0 if kind == "gemma" else 2
    assert kinds(made) == {LeanLinear: linears, LeanMlp: mlps, LeanNorm: norms}
    assert_same(losses_and_gradients(made), losses_and_gradients(model), 2e-5)


@pytest.mark.parametrize(
    "lora",
    [{"dropout": 0.4}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 5}}],
)
def test_adapters_of_other_kinds(lora: dict[str, Any]) -> None:
    """What the lean products do not describe runs as in peft, with the same random numbers."""
    model = adapted_model("llama", **lora)
    assert_same(losses_and_gradients(lean(model)), losses_and_gradients(model), 2e-5)


def test_with_checkpointed_layers() -> None:
    model = adapted_model("qwen3")
    made = lean(model)
    checkpoint_activations(made.get_base_model(), 1)
    assert_same(losses_and_gradients(made), losses_and_gradients(model), 2e-5)


def test_half_precision_is_as_in_peft_bit_for_bit() -> None:
    model = adapted_model("llama", torch.bfloat16)
    ours, theirs = losses_and_gradients(lean(model)), losses_and_gradients(model)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


def test_passes_without_gradients_are_the_plain_ones() -> None:
    model = adapted_model("llama")
    made = lean(model)
    with torch.no_grad():
        torch.testing.assert_close(
            made(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-6
        )
        with made.disable_adapter(), model.disable_adapter():
            assert torch.equal(made(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_the_base_alone_has_no_adapter_in_it() -> None:
    """Gradients of the input, with the adapter off."""
    model = adapted_model("llama")
    made = lean(model)
    results = []
    for each in (model, made):
        layer = decoder_layers(each.get_base_model())[0].mlp
        x = torch.ones(1, 2, 32, requires_grad=True)
        with each.disable_adapter():
            layer(x).sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_less_is_kept_for_the_backward_pass() -> None:
    """A norm's output and an MLP's inner products are computed again."""
    model = adapted_model("llama")

    def kept(model: Any) -> int:
        storages: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.get_base_model().model(input_ids=IDS).last_hidden_state
        assert output.requires_grad
        return sum(storages.values())

    assert kept(lean(model)) < 0.7 * kept(model)


def test_an_mlp_with_another_formula_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model("llama")
    mlp = type(decoder_layers(model.get_base_model())[0].mlp)
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 1.001 * plain(self, x))
    made = lean(model)
    assert kinds(made)[LeanMlp] == 0
    assert_same(losses_and_gradients(made), losses_and_gradients(model), 2e-5)
    assert lean_layers.gated_layers(decoder_layers(made.get_base_model())[0].mlp) is not None


def test_a_norms_output_that_is_changed_in_place_is_kept() -> None:
    model = adapted_model("llama")
    layer = decoder_layers(model)[0]
    x = torch.randn(2, 5, layer.input_layernorm.weight.shape[0], requires_grad=True)

    def gradient(layer: Any) -> torch.Tensor:
        product = layer.self_attn.q_proj(layer.input_layernorm(x).mul_(3.0))
        down = layer.self_attn.q_proj.lora_A["default"].weight  # its gradient needs the input
        return torch.autograd.grad(product.square().sum(), down)[0]

    want = gradient(layer)
    assert want.norm() > 0
    make_lean(model)
    assert isinstance(layer.self_attn.q_proj, LeanLinear)
    torch.testing.assert_close(gradient(layer), want, rtol=1e-4, atol=1e-3)
