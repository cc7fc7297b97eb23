"""What a vLLM server is asked for: its answers come from a stand-in on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.judge_server import serving
from support.lab import cpu_placement
from support.paths import SOKOBAN
from support.servers import engine_at

from minidistill.config import load_config
from minidistill.models.hub import load_tokenizer
from minidistill.trainer.loading import load_policy
from minidistill.types import Request, Role, SamplingParams

END_OF_TURN = 7


def answer(handler: Any, body: dict[str, Any]) -> None:
    """A completion that ends with the last of the tokens that are to end it."""
    ids = [5, body["stop_token_ids"][-1]]
    logprobs = {"token_logprobs": [-1.0] * len(ids)}
    handler.send_json(
        {"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}]}
    )


def test_a_server_stops_at_the_end_of_a_turn_too(tmp_path: Path) -> None:
    """Where the chat template's is another token than the model's files name."""
    loaded = load_config([SOKOBAN, "--no-trainer.model.lora"])
    tokenizer = load_tokenizer(loaded.config)
    placement = cpu_placement(loaded)
    policy = load_policy(loaded.config, tokenizer, placement, end_of_turn_ids={END_OF_TURN})
    assert tokenizer.eos_token_id != END_OF_TURN
    with serving(answer) as server:
        engine = engine_at(server.url, tmp_path)
        engine.attach(policy, (Role.STUDENT,))
        requests = [Request((3, 4), seed) for seed in (1, 2)]
        completions = engine.generate(requests, SamplingParams(8), Role.STUDENT)
        engine.close()
    assert server.paths == ["/v1/completions"] * 2
    for request in server.requests:
        assert request["stop_token_ids"] == sorted({END_OF_TURN, tokenizer.eos_token_id})
    assert [completion.stop for completion in completions] == ["eos"] * 2
