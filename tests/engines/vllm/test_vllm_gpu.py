"""What only GPUs can show of engines: IPC handles, the V2 runner's scores, sleep, placement."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.vllm import NEEDS_VLLM, SOKOBAN, placement_of

from minidistill import cli
from minidistill.config import load_config
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.engines.vllm.options import build_options
from minidistill.engines.vllm.weights_send import SendBuffer, open_buffer, views
from minidistill.errors import EXIT_OK
from minidistill.models.hub import load_tokenizer
from minidistill.trainer.loading import load_policy
from minidistill.types import Role

pytestmark = [*NEEDS_VLLM, pytest.mark.gpu]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
SHORT = (
    "--max_steps", "3", "--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline",
    "--orchestrator.batch_size", "8", "--orchestrator.env.0.args.num_train_examples", "16",
    "--inference.engine", "vllm",
)  # fmt: skip


def read(handle: Any, entries: Any, gpu: int, answers: Any) -> None:
    """In another process: the tensors behind a handle, on a GPU of its own choice."""
    device = torch.device("cuda", gpu)
    found = views(open_buffer(handle, device), entries)
    answers.put({name: tensor.float().cpu().numpy() for name, tensor in found.items()})


@pytest.mark.parametrize("gpu", [0, pytest.param(1, marks=TWO_GPUS)])
def test_a_handle_opens_in_another_process(gpu: int) -> None:
    """On the sender's GPU, and staged on another."""
    outbox = SendBuffer(torch.bfloat16, torch.device("cuda", 0), gpus=(gpu,))
    spawn = multiprocessing.get_context("spawn")
    for seed in (1, 2):
        torch.manual_seed(seed)
        tensors = [(n, torch.randn(shape)) for n, shape in (("a", (3, 5)), ("b", (7,)))]
        entries, answers = outbox.pack(tensors), spawn.Queue()
        process = spawn.Process(target=read, args=(outbox.handles((gpu,)), entries, gpu, answers))
        process.start()
        found = answers.get(timeout=120)
        process.join()
        for name, tensor in tensors:
            assert np.array_equal(found[name], tensor.bfloat16().float().numpy())


def test_any_ids_are_scored_where_the_v2_runner_is() -> None:
    flags = ("--inference.engine", "vllm", "--trainer.loss.estimator", "top_k")
    flags += ("--model.dtype", "float32", "--inference.gpu_memory_utilization", "0.3")
    config = load_config(
        [SOKOBAN, *flags, "--inference_gpu_ids", "0", "--trainer_gpu_ids", "0"]
    ).config
    device = torch.device("cuda", 0)
    placement = placement_of(config)
    assert placement.student.gpus == (0,)
    assert placement.student.sleeps
    engine = VllmEngine(build_options(config, placement.student, (0,), teacher=False), 0)
    try:
        engine.wait_until_ready()
        assert engine.capabilities.scores_ids, "this vLLM has no V2 runner"
        assert placement.teacher.scorer == "engine"
        policy = load_policy(config, load_tokenizer(config), placement)
        engine.attach(policy, (Role.STUDENT, Role.TEACHER))
        engine.sync(0)
        generator = torch.Generator().manual_seed(0)
        prompt, completion = torch.randint(2, 600, (2, 20), generator=generator).tolist()
        ids = torch.randint(2, 600, (20, 5), generator=generator).numpy()
        for _ in range(3):  # the second reads the cache, the third after a sleep
            (found,) = engine.score_ids([prompt], [completion], [ids], Role.TEACHER)
            with torch.no_grad(), policy.running_as(Role.TEACHER):
                tokens = torch.tensor([[*prompt, *completion]], device=device)
                logp = policy.causal(input_ids=tokens).logits[0, 19:-1].log_softmax(-1).cpu()
            truth = logp.gather(1, torch.as_tensor(ids))
            torch.testing.assert_close(torch.as_tensor(found), truth, rtol=0, atol=1e-2)
            engine.sleep()
        group = torch.randint(2, 600, (64,), generator=generator).tolist()  # whole blocks
        engine.score([group] * 4, [completion, completion, completion[::-1], [7]], Role.TEACHER)
        assert engine.score_counts == (7, 0), "a sequence was scored twice"
    finally:
        engine.close()


def steps(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "teacher_kl" in line]


@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
def test_a_run_that_shares_one_gpu(tmp_path: Path, estimator: str) -> None:
    flags = ("--inference_gpu_ids", "0", "--trainer_gpu_ids", "0", "--trainer.loss.estimator",
             estimator, "--inference.gpu_memory_utilization", "0.3")  # fmt: skip
    assert cli.main(["run", SOKOBAN, *SHORT, *flags, "--output_dir", str(tmp_path / "run")]) == 0
    found = steps(tmp_path / "run")
    assert all(record["kl/sampler_mismatch"] < 1e-2 for record in found)
    assert not any("perf/overlap" in record for record in found), "the engine must sleep"
    if estimator != "full":
        assert all(record["perf/teacher_repeat_frac"] == 0 for record in found)


@TWO_GPUS
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--trainer.loss.estimator", "sampled"),
        ("--trainer.loss.estimator", "top_k"),
        ("--trainer.loss.estimator", "sampled", "--teacher_gpu_ids", "0"),
    ],
    ids=["in the trainer", "in the engine", "at the likeliest ids", "in its own engine"],
)
def test_steps_are_streamed_on_two_gpus(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """With every place for the teacher: all overlap, and no sequence is scored twice."""
    placed = ("--inference_gpu_ids", "0", "--trainer_gpu_ids", "1", *flags)
    if "--teacher_gpu_ids" in flags:
        placed += ("--inference.gpu_memory_utilization", "0.3")
        placed += ("--teacher_inference.gpu_memory_utilization", "0.3")
    path = tmp_path / "run"
    assert cli.main(["run", SOKOBAN, *SHORT, *placed, "--output_dir", str(path)]) == EXIT_OK
    for record in steps(path):
        assert record["kl/sampler_mismatch"] < 1e-2
        assert 0 <= record["perf/overlap"] <= 1
        assert record.get("perf/teacher_repeat_frac", 0) == 0


@TWO_GPUS
@pytest.mark.parametrize("more", [(), ("--no-trainer.model.lora",)])
def test_two_replicas_read_one_copy_of_the_weights(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Each beside a rank; for the second one the copy is staged on its GPU."""
    flags = ("--inference_gpu_ids", "0,1", "--trainer_gpu_ids", "0,1", *more)
    flags += ("--inference.parallel.dp", "2", "--inference.gpu_memory_utilization", "0.3")
    path = tmp_path / "run"
    assert cli.main(["run", SOKOBAN, *SHORT, *flags, "--output_dir", str(path)]) == EXIT_OK
    assert all(record["kl/sampler_mismatch"] < 1e-2 for record in steps(path))


@TWO_GPUS
@pytest.mark.parametrize("more", [(), ("--no-trainer.model.lora",), ("--schedule", "async")])
def test_a_run_on_two_gpus(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Weights reach an engine on another GPU than the trainer's."""
    flags = ("--inference_gpu_ids", "0", "--trainer_gpu_ids", "1", *more)
    path = tmp_path / "run"
    assert cli.main(["run", SOKOBAN, *SHORT, *flags, "--output_dir", str(path)]) == EXIT_OK
    if "async" not in more:
        assert all(record["kl/sampler_mismatch"] < 1e-2 for record in steps(path))
