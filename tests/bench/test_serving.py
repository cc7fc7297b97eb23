"""`python -m bench.serving`, with servers that stream, cache and count blocks but have no model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_serving import BLOCK, FakeServing
from transformers import AutoModelForCausalLM

from bench import pair, serving
from bench.serving_client import Answer, Round, ask, read_blocks
from bench.serving_measure import WAYS, Memory, Setting, check_round, figures
from bench.serving_servers import Server, adapter_flags, random_adapter
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_USAGE, UserError
from minidistill.models.registry import resolve

TINY_BYTES = 2 * 4 * 4 * 32 * 2  # keys and values, layers, heads, their size, bytes
PLAIN, CACHING, ADAPTER, MERGED = WAYS
SETTING = Setting((500, 8000), 8, question=64, completion=64, rounds=2, limit=60.0)


@pytest.fixture
def fake() -> Iterator[FakeServing]:
    server = FakeServing(1, ["--enable-prefix-caching"], 1000 * BLOCK, at_once=3)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("way", "context", "one", "eight"),
    [
        # 628 and 8128 tokens in blocks of 32: 20 and 254 blocks
        (PLAIN, 500, 20, 160),
        (PLAIN, 8000, 254, 2032),
        # 15 and 250 full blocks of the context are shared
        (CACHING, 500, 20, 15 + 8 * 5),
        (CACHING, 8000, 254, 250 + 8 * 4),
        # 128 tokens, whatever the context was
        (ADAPTER, 500, 4, 32),
        (ADAPTER, 8000, 4, 32),
        (MERGED, 8000, 4, 32),
    ],
)
def test_keys_and_values_by_formula(way: Any, context: int, one: int, eight: int) -> None:
    memory = Memory.of(way, context, SETTING, BLOCK, 10)
    assert memory.bytes(1) == one * BLOCK * 10
    assert memory.bytes(8) == eight * BLOCK * 10
    assert memory.more * 7 == memory.bytes(8) - memory.bytes(1)


def test_blocks_are_read_from_metrics() -> None:
    text = (
        "# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.\n"
        'vllm:cache_config_info{block_size="16",a="{}",num_gpu_blocks="101"} 1.0\n'
        'vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.07000000000000006\n'
    )
    blocks = read_blocks(text)
    assert (blocks.tokens, blocks.total, blocks.used) == (16, 101, 7)
    for broken in ("", text.replace("usage_perc{", "other{"), text.replace('"101"', '"None"')):
        with pytest.raises(UserError) as caught:
            read_blocks(broken)
        assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_requests_are_sent_at_once_and_their_tokens_timed(fake: FakeServing) -> None:
    context = tuple(range(70))
    prompts = [(*context, 100 + i) for i in range(3)]
    fake.token_seconds, fake.until_looked = 0.01, True
    cold = ask(fake.url, "base", prompts, 12, look=True)
    assert sorted(fake.prompts) == prompts
    assert [len(answer.times) for answer in cold.answers] == [12, 12, 12]
    for answer in cold.answers:
        assert sorted(answer.times) == list(answer.times)
        assert answer.times[-1] >= 11 * 0.01, "the first is sent after the request"
        assert answer.first + 11 * answer.between == pytest.approx(answer.times[-1])
        assert answer.times[-1] <= cold.seconds
    assert cold.rate == pytest.approx(36 / cold.seconds)
    fake.until_looked = False
    warm = ask(fake.url, "base", prompts, 12)
    assert {answer.cached for answer in warm.answers} == {64}, "two full blocks"
    assert warm.blocks is None, "nobody looked"
    # 83 tokens are 3 blocks, of which the first two are the same
    assert cold.blocks == 2 + 3


def fewer_tokens(fake: FakeServing) -> None:
    fake.most_tokens = 3


def another_prompt(fake: FakeServing) -> None:
    fake.prompt_tokens = 1


def no_page(fake: FakeServing) -> None:
    fake.url += "/no"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fewer_tokens, "3 of 4 tokens"),
        (another_prompt, "'prompt_tokens': 1"),
        (no_page, "HTTP 404: no such page"),
    ],
)
def test_an_answer_that_was_not_asked_for_is_an_error(
    fake: FakeServing, change: Any, message: str
) -> None:
    fake.barrier = threading.Barrier(1)
    change(fake)
    with pytest.raises(UserError, match=message) as caught:
        ask(fake.url, "base", [(1, 2)], 4)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_a_server_that_has_gone_is_an_error() -> None:
    gone = FakeServing(1, [], BLOCK)
    gone.close()
    with pytest.raises(UserError, match="broke off") as caught:
        ask(gone.url, "base", [(1, 2)], 4, look=True)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def rounds_of(cached: int, blocks: int | None) -> Round:
    return Round(1.0, (Answer((0.1, 0.2), cached), Answer((0.1, 0.2), cached)), blocks)


def test_a_round_that_is_not_what_its_row_says_is_refused() -> None:
    memory = Memory.of(CACHING, 500, SETTING, BLOCK, 10)
    # 18 blocks have a prompt's 564 tokens, 20 a request's 628
    for blocks in (None, 15 + 2 * 3, 15 + 2 * 5):
        check_round(CACHING, rounds_of(480, blocks), memory, 480)
    for cached, blocks in ((0, None), (512, None), (480, 20), (480, 26), (480, 40)):
        with pytest.raises(UserError) as caught:
            check_round(CACHING, rounds_of(cached, blocks), memory, 480)
        assert caught.value.exit_code == EXIT_FAILED


def test_medians() -> None:
    rounds = [
        Round(2.0, (Answer((0.1, 0.3, 0.5), 0), Answer((0.2, 0.3, 0.4), 0)), None),
        Round(1.0, (Answer((0.3, 0.4, 0.5), 0), Answer((0.9, 1.0, 1.1), 0)), None),
        Round(4.0, (Answer((0.4, 0.5, 0.6), 0), Answer((0.8, 0.9, 1.0), 0)), None),
    ]
    result = figures(rounds)
    assert result["first"] == pytest.approx(0.35)
    assert result["between"] == pytest.approx(0.1)
    assert result["rate"] == pytest.approx(3.0)
    assert [r["seconds"] for r in result["rounds"]] == [2.0, 1.0, 4.0]


def test_the_random_adapter_is_pefts_and_changes_every_linear_layer(tmp_path: Path) -> None:
    from peft import PeftModel

    from minidistill.models.auto import text_linears

    model = AutoModelForCausalLM.from_pretrained(resolve("tiny-sokoban"), dtype=torch.float32)
    names = {name for name, _ in text_linears(model)}
    ids = torch.arange(2, 40)[None]
    before = model(input_ids=ids).logits
    random_adapter(model.config, 16, tmp_path)
    adapted = PeftModel.from_pretrained(model, tmp_path)
    change = (adapted(input_ids=ids).logits - before).abs().max()
    assert 1e-3 < change < 10
    deltas = {n: m for n, m in adapted.named_modules() if hasattr(m, "get_delta_weight")}
    assert {n.removeprefix("base_model.model.") for n in deltas} == names
    for module in deltas.values():
        delta = module.get_delta_weight("default")
        assert torch.linalg.matrix_rank(delta) == 16
    assert adapter_flags(tmp_path, gpu=True) == [
        "--enable-lora", "--max-loras", "1", "--max-lora-rank", "16",
        "--lora-modules", f"adapter={tmp_path}",
    ]  # fmt: skip


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    for text in (None, "{", "{}", '{"r": 1000}'):
        if text is not None:
            (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="no LoRA adapter") as caught:
            adapter_flags(tmp_path, gpu=True)
        assert caught.value.exit_code == EXIT_USAGE
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q_proj": 20}}')
    assert "32" in adapter_flags(tmp_path, gpu=True)


QUICK = (
    "--model", "tiny-sokoban", "--contexts", "70,200", "--at-once", "4", "--question", "20",
    "--completion", "16", "--rounds", "1",
)  # fmt: skip


class Servers:
    """Replaces `Server`. `change` makes a server that is not what it should be."""

    def __init__(self, change: Any = lambda fake: None) -> None:
        self.change, self.started = change, list[FakeServing]()

    def __call__(
        self, model: str, flags: Sequence[str], size: int, longest: int, gpu: bool
    ) -> FakeServing:
        assert model == resolve("tiny-sokoban")
        assert longest in (106, 236)
        fake = FakeServing(TINY_BYTES, flags, size)
        self.change(fake)
        self.started.append(fake)
        return fake


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pair, "RESULTS", tmp_path)
    monkeypatch.setattr(serving, "use_threads", lambda threads: None)
    monkeypatch.setattr(serving.vllm_version, "require", lambda **named: "0.32.0")
    return tmp_path / "serving.json"


def test_all_rows_are_measured_and_saved(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = Servers()
    monkeypatch.setattr(serving, "Server", servers)
    assert serving.main(QUICK) == 0
    report = json.loads(results.read_text())["tiny-sokoban"]
    rows = {(row["context"], row["at_once"], row["way"]): row for row in report["rows"]}
    assert len(rows) == 2 * 2 * 4
    for row in rows.values():
        assert len(row["rounds"]) == 1
        assert min(row["first"], row["between"], row["rate"]) > 0
    block = BLOCK * TINY_BYTES
    # 70 + 20 + 16 tokens: 4 blocks, 2 of them shared
    assert rows[70, 4, "context, no prefix cache"]["bytes"] == 4 * block
    assert rows[70, 4, "context, prefix cache"]["more_bytes"] == 2 * block
    assert rows[200, 1, "adapter"]["bytes"] == 2 * block
    assert report["settings"]["token_bytes"] == TINY_BYTES
    plain, caching, adapter = servers.started
    assert "--no-enable-prefix-caching" in plain.flags
    assert "--enable-lora" in adapter.flags
    # each question is asked once, and none without the context is sent to the first server
    for server in servers.started:
        assert len(set(server.prompts)) == len(server.prompts)
    assert {len(prompt) for prompt in plain.prompts} == {90, 220}
    assert {len(prompt) for prompt in caching.prompts} == {90, 220, 20}
    assert {len(prompt) for prompt in adapter.prompts} == {20}
    assert "adapter merged" in capsys.readouterr().out


def caches(fake: FakeServing) -> None:
    fake.caches = True


def applies_none(fake: FakeServing) -> None:
    fake.adapter_changes = False


def has_other_blocks(fake: FakeServing) -> None:
    fake.total -= 1


def holds_more(fake: FakeServing) -> None:
    fake.held[-1] = set(range(100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (caches, "context, no prefix cache: .64. tokens of a prompt came from the prefix cache"),
        (applies_none, "the adapter changes nothing"),
        (has_other_blocks, "are not the 2048 bytes of the formula"),
        (holds_more, "requests held 10. blocks, not 3 to 4"),
    ],
)
def test_a_server_that_is_not_what_a_row_says_leaves_no_results(
    change: Any, message: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "Server", Servers(change))
    with pytest.raises(UserError, match=message) as caught:
        serving.main(QUICK)
    assert caught.value.exit_code == EXIT_FAILED
    assert not results.exists()


def test_a_way_of_which_a_round_takes_too_long_is_left_out(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(fake: FakeServing) -> None:
        if not fake.caches:
            fake.token_seconds = 0.02  # 0.3 s for a request, 1.3 s for four

    monkeypatch.setattr(serving, "Server", Servers(slow))
    assert serving.main([*QUICK, "--contexts", "70", "--limit", "0.8"]) == 0
    rows = json.loads(results.read_text())["tiny-sokoban"]["rows"]
    left_out = [(row["at_once"], row["way"]) for row in rows if "first" not in row]
    assert left_out == [(4, "context, no prefix cache")]
    assert all(row["seconds"] > 1.2 for row in rows if "first" not in row)
    assert "left out" in capsys.readouterr().out


def test_a_context_that_does_not_fit_is_refused(results: Path) -> None:
    with pytest.raises(UserError, match="tiny-sokoban reads 1024 tokens") as caught:
        serving.main(["--model", "tiny-sokoban", "--contexts", "500,1000"])
    assert caught.value.exit_code == EXIT_USAGE
    assert "at most 896 tokens" in caught.value.fix


@pytest.mark.parametrize(
    "flags", [["--rounds", "0"], ["--contexts", "0,5"], ["--limit", "nan"], ["--contexts", "x"]]
)
def test_arguments_that_measure_nothing_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serving.main(flags)
    assert caught.value.code == EXIT_USAGE


@pytest.mark.vllm
def test_a_real_server_that_does_not_start_says_why() -> None:
    server = Server("tiny-sokoban", ["--no-such-flag"], 1 << 26, 128, gpu=False)
    try:
        with pytest.raises(UserError, match="unrecognized arguments: --no-such-flag"):
            server.wait_until_ready()
    finally:
        server.close()
