"""What only GPUs can show of engines: IPC handles, the V2 runner's scores, sleep, placement.

Without a GPU the handles are those of shared memory, vLLM's CPU build is the engine, and runs
sample with the embedded one.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from support import forked
from support.gpus import DEVICE, REHEARSED, TWO_GPUS, size
from support.runs import plan_on_gpus, run_on_gpus
from support.vllm import NEEDS_VLLM, Bench, make_bench, student_error

from minidistill.engines.vllm.weights_buffer import SendBuffer, open_buffer, views
from minidistill.errors import EXIT_OK
from minidistill.types import Role
from tools.forked import CONTEXT

pytestmark = [*NEEDS_VLLM, pytest.mark.gpu]
SHORT = (
    "--max_steps", "3", "--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline",
    "--orchestrator.batch_size", "8", "--orchestrator.env.0.args.num_train_examples", "16",
)  # fmt: skip
VLLM = ("--inference.engine", "vllm")
EMBEDDED = (*SHORT, "--inference.engine", "embedded")
ONE_GPU = ("--inference_gpu_ids", "0", "--trainer_gpu_ids", "0",
           "--inference.gpu_memory_utilization", "0.3")  # fmt: skip
FP32_ERROR = size(1e-2, 1e-4)  # of vLLM's fp32 log-probs: on a GPU its products may use TF32


def read(handle: Any, entries: Any, device: torch.device, answers: Any) -> None:
    """In another process: the tensors behind a handle, on a device of its own choice."""
    tensors = views(open_buffer(handle, device), entries)
    answers.put({name: tensor.float().cpu().numpy() for name, tensor in tensors.items()})


@pytest.mark.parametrize("reader", [0, pytest.param(1, marks=TWO_GPUS)])
def test_a_handle_opens_in_another_process(reader: int) -> None:
    """On the sender's GPU, and staged on another."""
    device = DEVICE if REHEARSED else torch.device("cuda", reader)
    outbox = SendBuffer(torch.bfloat16, DEVICE, gpus=size((reader,), ()))
    if REHEARSED:
        forked.start_server()
    spawn: Any = CONTEXT if REHEARSED else multiprocessing.get_context("spawn")
    for seed in size((1, 2), (1,)):
        torch.manual_seed(seed)
        tensors = [(n, torch.randn(shape)) for n, shape in (("a", (3, 5)), ("b", (7,)))]
        entries, answers = outbox.pack(tensors), spawn.Queue()
        handles = outbox.handles(size((reader,), ()))
        process = spawn.Process(target=read, args=(handles, entries, device, answers))
        process.start()
        received = answers.get(timeout=120)
        process.join()
        for name, tensor in tensors:
            assert np.array_equal(received[name], tensor.bfloat16().float().numpy())


@pytest.fixture(scope="module")
def adapter_on_gpu(request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield from bench_for(request, "adapter_bench", "--trainer.loss.estimator", "top_k")


@pytest.fixture(scope="module")
def weights_on_gpu(request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield from bench_for(request, "weights_bench", "--no-trainer.model.lora")


def bench_for(request: pytest.FixtureRequest, shared: str, *flags: str) -> Iterator[Bench]:
    """An engine on the first GPU; in a rehearsal the CPU's, which other files share."""
    flags = (*flags, "--model.dtype", "float32", *ONE_GPU)
    if REHEARSED:
        plan_on_gpus(*VLLM, *flags)
        yield request.getfixturevalue(shared)
        return
    bench = make_bench(*flags)
    yield bench
    bench.engine.close()


def test_an_adapter_reaches_the_engine_and_survives_a_sleep(adapter_on_gpu: Bench) -> None:
    for seed in (1, 2, 3):
        adapter_on_gpu.change(seed, scale=0.03)
        adapter_on_gpu.sync()
        assert student_error(adapter_on_gpu) < FP32_ERROR
        adapter_on_gpu.engine.sleep()
    adapter_on_gpu.change(4, scale=0.3)  # not synced: the engine must now be wrong
    assert student_error(adapter_on_gpu) > 2 * FP32_ERROR


def test_every_weight_reaches_the_engine(weights_on_gpu: Bench) -> None:
    for _ in range(3):
        with torch.no_grad():
            for _, parameter in weights_on_gpu.policy.parameters:
                parameter.mul_(1.02)
        weights_on_gpu.sync()
        assert student_error(weights_on_gpu) < FP32_ERROR
        weights_on_gpu.engine.sleep()


def test_any_ids_are_scored_where_the_v2_runner_is(adapter_on_gpu: Bench) -> None:
    """vLLM's CPU build has no V2 runner: there a stand-in of the same signature answers."""
    bench, engine = adapter_on_gpu, adapter_on_gpu.engine
    bench.sync()
    generator = torch.Generator().manual_seed(0)
    prompt, completion = torch.randint(2, 600, (2, 20), generator=generator).tolist()
    ids = torch.randint(2, 600, (20, 5), generator=generator).numpy()

    def truth(role: Role) -> torch.Tensor:
        with torch.no_grad(), bench.policy.running_as(role):
            tokens = torch.tensor([[*prompt, *completion]], device=DEVICE)
            logp = bench.policy.causal(input_ids=tokens).logits[0, 19:-1].log_softmax(-1).cpu()
        return logp.gather(1, torch.as_tensor(ids))

    score_ids = engine.score_ids
    if REHEARSED:
        assert not engine.capabilities.scores_ids
        answer = [truth(Role.TEACHER).numpy()]
        score_ids = create_autospec(engine.score_ids, return_value=answer)
    else:
        assert engine.capabilities.scores_ids, "this vLLM has no V2 runner"
    for _ in range(3):  # the second reads the cache, the third after a sleep
        (scores,) = score_ids([prompt], [completion], [ids], Role.TEACHER)
        expected = truth(Role.TEACHER)
        torch.testing.assert_close(torch.as_tensor(scores), expected, rtol=0, atol=1e-2)
        engine.sleep()


def test_no_sequence_of_a_group_is_scored_twice(adapter_on_gpu: Bench) -> None:
    engine = adapter_on_gpu.engine
    adapter_on_gpu.sync()
    generator = torch.Generator().manual_seed(1)
    group = torch.randint(2, 600, (64,), generator=generator).tolist()  # whole blocks
    completion = torch.randint(2, 600, (20,), generator=generator).tolist()
    scored, repeated = engine.score_counts
    engine.score([group] * 4, [completion, completion, completion[::-1], [7]], Role.TEACHER)
    assert engine.score_counts == (scored + 4, repeated)


def steps(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "teacher_kl" in line]


@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
def test_a_run_that_shares_one_gpu(tmp_path: Path, estimator: str) -> None:
    path, chosen = tmp_path / "run", ("--trainer.loss.estimator", estimator)
    flags = (*SHORT, *VLLM, *ONE_GPU, *chosen)
    assert run_on_gpus(path, flags, (*EMBEDDED, *chosen)) == EXIT_OK
    assert len(steps(path)) == 3
    assert all(record["kl/sampler_mismatch"] < 1e-2 for record in steps(path))
    assert not any("perf/overlap" in record for record in steps(path)), "the engine must sleep"
    assert all(record.get("perf/teacher_repeat_frac", 0) == 0 for record in steps(path))


@TWO_GPUS
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--trainer.loss.estimator", "sampled"),
        ("--trainer.loss.estimator", "top_k"),
        ("--trainer.loss.estimator", "sampled", "--teacher_gpu_ids", "0"),
    ],
    ids=["in the trainer", "in the engine", "at the most likely ids", "in its own engine"],
)
def test_steps_are_streamed_on_two_gpus(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """With every place for the teacher: all overlap, and no sequence is scored twice."""
    placed = ("--inference_gpu_ids", "0", "--trainer_gpu_ids", "1", *flags)
    if "--teacher_gpu_ids" in flags:
        placed += ("--inference.gpu_memory_utilization", "0.3")
        placed += ("--teacher_inference.gpu_memory_utilization", "0.3")
        placed += ("--no-teacher_inference.share",)
    path = tmp_path / "run"
    assert run_on_gpus(path, (*SHORT, *VLLM, *placed), (*EMBEDDED, *flags[:2])) == EXIT_OK
    for record in steps(path):
        assert record["kl/sampler_mismatch"] < 1e-2
        assert REHEARSED or 0 <= record["perf/overlap"] <= 1
        assert record.get("perf/teacher_repeat_frac", 0) == 0


@TWO_GPUS
@pytest.mark.parametrize("more", [(), ("--no-trainer.model.lora",)])
def test_two_replicas_read_one_copy_of_the_weights(tmp_path: Path, more: tuple[str, ...]) -> None:
    """One on the driver's GPU, one whose GPU the copy is staged on."""
    flags = ("--inference_gpu_ids", "0,1", "--trainer_gpu_ids", "0,1", *more)
    flags += ("--inference.parallel.dp", "2", "--inference.gpu_memory_utilization", "0.3")
    path = tmp_path / "run"
    assert run_on_gpus(path, (*SHORT, *VLLM, *flags), (*EMBEDDED, *more)) == EXIT_OK
    assert all(record["kl/sampler_mismatch"] < 1e-2 for record in steps(path))


@TWO_GPUS
@pytest.mark.parametrize("more", [(), ("--no-trainer.model.lora",), ("--schedule", "async")])
def test_a_run_on_two_gpus(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Weights reach an engine on another GPU than the trainer's."""
    path = tmp_path / "run"
    flags = (*SHORT, *VLLM, "--inference_gpu_ids", "0", "--trainer_gpu_ids", "1", *more)
    rehearsal = (*EMBEDDED, *(() if "async" in more else more))  # it cannot sample ahead
    assert run_on_gpus(path, flags, rehearsal) == EXIT_OK
    assert len(steps(path)) == 3
    if "async" not in more:
        assert all(record["kl/sampler_mismatch"] < 1e-2 for record in steps(path))
