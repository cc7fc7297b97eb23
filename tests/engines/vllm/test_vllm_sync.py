"""Full weights in memory against transformers, for models that are packed in different ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.vllm import CPU, NEEDS_CPU_VLLM, SOKOBAN, options_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from minidistill.config import load_config
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.errors import UserError
from minidistill.trainer.policy import Policy
from minidistill.types import Role

pytestmark = NEEDS_CPU_VLLM

SIZES: dict[str, Any] = {
    "vocab_size": 640, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "initializer_range": 0.1, "use_cache": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "biases, untied head": {"model_type": "qwen2", "tie_word_embeddings": False},
    "norms of queries and keys, tied head": {"model_type": "qwen3", "tie_word_embeddings": True},
}
EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe", "tie_word_embeddings": False, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1,
}  # fmt: skip


@dataclass
class Pair:
    """An engine and transformers' model, whose weights it is to have."""

    engine: VllmEngine
    model: PreTrainedModel

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()

    @torch.no_grad()
    def change(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def error(self) -> float:
        """The largest difference of any log-prob."""
        rows = torch.randint(2, 600, (4, 24), generator=torch.Generator().manual_seed(0))
        prompts, completions = rows[:, :9].tolist(), rows[:, 9:].tolist()
        found = self.engine.score(prompts, completions, Role.TEACHER)
        logp = self.model(input_ids=rows).logits[:, 8:-1].log_softmax(-1)
        truth = logp.gather(2, rows[:, 9:, None])[:, :, 0]
        return float((truth - torch.tensor(found)).abs().max())


def make_pair(settings: dict[str, Any], folder: Path) -> Pair:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases and norms that matter
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    flags = ["--model.name", str(folder), "--inference.engine", "vllm", "--no-trainer.model.lora"]
    run = load_config([SOKOBAN, *flags]).config
    engine = VllmEngine(options_of(run), 0)
    engine.attach(Policy(model, None, frozenset(), CPU), (Role.STUDENT,))
    return Pair(engine, model)


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    made = make_pair(MODELS[request.param], tmp_path_factory.mktemp("model"))
    yield made
    made.engine.close()


def test_the_engine_has_the_weights_after_1_2_and_20_syncs(pair: Pair) -> None:
    assert pair.error() < 1e-4, "before any sync"
    for version in range(1, 21):
        pair.change(version)
        # a whole model at once, and chunks that end in the middle of a fused layer
        pair.engine.sender.chunk_bytes = 1 << 30 if version % 2 else 1 << 17
        pair.engine.sync_weights(version, pair.weights)
        if version in (1, 2, 20):
            assert pair.error() < 1e-4
    pair.change(21)
    assert pair.error() > 1e-2, "not synced: the engine must now be wrong"


def test_a_sync_follows_a_reload_from_a_file(pair: Pair, tmp_path: Path) -> None:
    pair.change(31)
    pair.model.save_pretrained(tmp_path)
    pair.engine.process.call("reload", path=str(tmp_path))
    pair.change(32)
    pair.engine.sync_weights(32, pair.weights)
    assert pair.error() < 1e-4


def test_a_layer_that_did_not_come_whole_is_an_error(pair: Pair) -> None:
    """Last, for the engine is not used after it: better than a model of old and new weights."""
    partial = list(pair.weights())
    dropped = next(i for i, (name, _) in enumerate(partial) if "k_proj.weight" in name)
    del partial[dropped]
    pair.engine.wait_until_ready()
    with pytest.raises(UserError, match="1 layers are incomplete"):
        pair.engine.sync_weights(40, lambda: partial)


def test_what_would_keep_old_weights_is_refused(tmp_path: Path) -> None:
    """Packed experts stay as they were after vLLM's own reload, and nothing says so."""
    pair = make_pair(EXPERTS, tmp_path)
    try:
        pair.engine.wait_until_ready()
        with pytest.raises(UserError, match=r"experts.* takes no new weights"):
            pair.engine.sync_weights(1, pair.weights)
        assert pair.error() < 1e-4, "and the engine goes on with those that it had"
    finally:
        pair.engine.close()
