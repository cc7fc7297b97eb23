"""The GPUs that sample, score and train, on machines with one to eight GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minidistill.errors import UserError
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.placement import Models, Placement, place

Configure = Callable[..., Any]
SAMPLED = "--trainer.loss.estimator sampled"
SHARE = f"{SAMPLED} --teacher_inference.share"
FULL_FT = f"{SAMPLED} --no-trainer.model.lora"  # its frozen teacher needs an engine


class FakeModel:
    """The parts of a model's configuration that its placement depends on."""

    max_position_embeddings = None
    model_type, head_dim = "llama", 64

    def __init__(self, heads: int) -> None:
        self.num_attention_heads = heads

    def get_text_config(self) -> FakeModel:
        return self


def placed(
    configure: Configure, gpus: int, flags: str = "", heads: int = 32, vllm: bool = True
) -> Placement:
    model = FakeModel(heads)
    machine = Machine(gpus, 80 * GIB, vllm=vllm, bf16=gpus > 0)
    return place(configure(*flags.split()).config, Models(model, model), machine)


def teacher_gpus(placement: Placement) -> tuple[int, ...]:
    return placement.teacher_engine.gpus if placement.teacher_engine else ()


def as_text(placement: Placement) -> str:
    """The GPUs of student, teacher and trainer, as in `0,1 | 2 | 3`."""
    roles = placement.student.gpus, teacher_gpus(placement), placement.trainer_gpus
    return " | ".join(",".join(map(str, ids)) for ids in roles)


# batch_size is 64: three GPUs cannot train
TABLE = [
    (1, SAMPLED, "0 |  | 0"),
    (2, SAMPLED, "0 |  | 1"),
    (3, SAMPLED, "0 |  | 1,2"),
    (4, SAMPLED, "0 | 1 | 2,3"),
    (5, SAMPLED, "0,1 | 2 | 3,4"),
    (6, SAMPLED, "0,1 | 2,3 | 4,5"),
    (7, SAMPLED, "0,1 | 2 | 3,4,5,6"),
    (8, SAMPLED, "0,1 | 2,3 | 4,5,6,7"),
    (1, SHARE, "0 |  | 0"),
    (2, SHARE, "0 |  | 1"),
    (3, SHARE, "0 |  | 1,2"),
    (4, SHARE, "0,1 |  | 2,3"),
    (5, SHARE, "0,1,2 |  | 3,4"),
    (6, SHARE, "0,1,2,3 |  | 4,5"),
    (7, SHARE, "0,1,2 |  | 3,4,5,6"),
    (8, SHARE, "0,1,2,3 |  | 4,5,6,7"),
    (1, "", "0 |  | 0"),
    (2, "", "0 |  | 1"),
    (3, "", "0 |  | 1,2"),
    (4, "", "0,1 |  | 2,3"),
    (5, "", "0,1,2 |  | 3,4"),
    (6, "", "0,1,2,3 |  | 4,5"),
    (7, "", "0,1,2 |  | 3,4,5,6"),
    (8, "", "0,1,2,3 |  | 4,5,6,7"),
    (1, FULL_FT, "0 | 0 | 0"),
    (2, FULL_FT, "0 | 0 | 1"),
    (3, FULL_FT, "0 | 1 | 2"),
    (4, FULL_FT, "0 | 1 | 2,3"),
    (5, FULL_FT, "0,1 | 2 | 3,4"),
    (6, FULL_FT, "0,1 | 2,3 | 4,5"),
    (7, FULL_FT, "0,1 | 2 | 3,4,5,6"),
    (8, FULL_FT, "0,1 | 2,3 | 4,5,6,7"),
    (0, SAMPLED, " |  | "),
    # the configuration asks for a separate engine for the teacher
    (2, f"{SAMPLED} --no-teacher_inference.share", "0 | 0 | 1"),
    (3, f"{SAMPLED} --no-teacher_inference.share", "0 | 1 | 2"),
    # the number of ranks divides the batch
    (8, f"{SAMPLED} --orchestrator.batch_size 12", "0,1 | 2,3 | 4,5,6,7"),
    (7, f"{SAMPLED} --orchestrator.batch_size 12", "0,1 | 2 | 3,4,5,6"),
    (6, f"{SAMPLED} --orchestrator.batch_size 12", "0,1 | 2 | 3,4,5"),
    # replicas of several GPUs
    (4, f"{SAMPLED} --inference.parallel.tp 2", "0,1 | 2 | 3"),
    (8, f"{SAMPLED} --inference.parallel.tp 4", "0,1,2,3 | 4,5 | 6,7"),
    (8, "--inference.parallel.tp 2 --inference.parallel.dp 1", "0,1 |  | 2,3,4,5"),
    # some ids are set: the other roles share the rest in the same proportions
    (8, f"{SAMPLED} --inference_gpu_ids 6,7", "6,7 | 0,1 | 2,3,4,5"),
    (8, f"{SAMPLED} --trainer_gpu_ids 0,1,2,3", "4,5 | 6,7 | 0,1,2,3"),
    (8, f"{SAMPLED} --teacher_gpu_ids 0", "1,2,3 | 0 | 4,5,6,7"),
    (4, f"{SAMPLED} --teacher_gpu_ids 0 --trainer_gpu_ids 1,2", "3 | 0 | 1,2"),
    (4, f"{SAMPLED} --teacher_gpu_ids 0 --inference_gpu_ids 3", "3 | 0 | 1,2"),
    (4, "--trainer_gpu_ids 3", "0,1,2 |  | 3"),
    (4, "--inference_gpu_ids 3", "3 |  | 0,1"),
    (2, f"{FULL_FT} --inference_gpu_ids 1", "1 | 1 | 0"),
    # the same GPUs for several roles
    (2, "--inference_gpu_ids 0,1 --trainer_gpu_ids 0,1", "0,1 |  | 0,1"),
    (2, f"{SAMPLED} --inference_gpu_ids 0 --teacher_gpu_ids 0 --trainer_gpu_ids 1", "0 |  | 1"),
    (4, f"{SAMPLED} --inference_gpu_ids 0 --teacher_gpu_ids 0", "0 |  | 1,2"),
    (4, f"{FULL_FT} --inference_gpu_ids 0 --teacher_gpu_ids 0", "0 | 0 | 1,2"),
    (1, "--inference_gpu_ids 0 --teacher_gpu_ids 0 --trainer_gpu_ids 0", "0 |  | 0"),
    # the trainer's model samples
    (4, "--inference.engine embedded", " |  | 0,1,2,3"),
    (3, "--inference.engine embedded", " |  | 0,1"),
    (2, "--inference.engine embedded --inference_gpu_ids 1", " |  | 1"),
]


@pytest.mark.parametrize(("gpus", "flags", "expected"), TABLE)
def test_gpus_of_each_role(configure: Configure, gpus: int, flags: str, expected: str) -> None:
    placement = placed(configure, gpus, flags)
    assert as_text(placement) == expected
    engines = [placement.student, placement.teacher_engine]
    for engine in engines:
        if engine is not None and engine.gpus:
            assert [gpu for replica in engine.replicas for gpu in replica] == list(engine.gpus)
            assert {len(replica) for replica in engine.replicas} == {engine.tp}
            assert engine.sleeps == bool({*engine.gpus} & {*placement.trainer_gpus})
    used = {*placement.student.gpus, *teacher_gpus(placement)}
    assert placement.sleeps == bool(used & {*placement.trainer_gpus})


def test_documented_command_lines_for_four_and_eight_gpus(configure: Configure) -> None:
    line = "--inference_gpu_ids 0,1 --teacher_gpu_ids 2 --trainer_gpu_ids 3"
    four = placed(configure, 4, f"{line} --inference.parallel.dp 2")
    assert four.teacher_engine is not None
    assert (as_text(four), four.student.dp, four.teacher_engine.dp) == ("0,1 | 2 | 3", 2, 1)
    assert four.warnings == ()
    line = "--inference_gpu_ids 0 1 --teacher_gpu_ids 2 3 --trainer_gpu_ids 4 5 6 7"
    tp = "--inference.parallel.tp 2 --teacher_inference.parallel.tp 2"
    eight = placed(configure, 8, f"{line} {tp}")
    assert as_text(eight) == "0,1 | 2,3 | 4,5,6,7"
    assert eight.teacher_engine is not None
    assert (eight.student.dp, eight.teacher_engine.dp, eight.ranks) == (1, 1, 4)
    assert not eight.sleeps
    # the same without the lists
    assert as_text(placed(configure, 8, f"{SAMPLED} {tp}")) == as_text(eight)


def test_without_vllm_the_trainer_gets_all_gpus(configure: Configure) -> None:
    assert as_text(placed(configure, 2, vllm=False)) == " |  | 0,1"


WARNINGS = [
    (1, "", ""),
    (3, "--inference.parallel.tp 1 --inference_gpu_ids 0", ""),
    (3, "--trainer_gpu_ids 0 --inference.parallel.dp 1", "GPU 2 stays idle"),
    (4, "--inference_gpu_ids 3", "GPU 2 stays idle"),
    (7, "--inference.parallel.tp 2", "GPU 6 stays idle"),
    (3, "--inference.engine embedded", "GPU 2 stays idle"),
    (2, FULL_FT, "two engines share GPU 0: its memory is split"),
    (2, "--inference_gpu_ids 0,1 --trainer_gpu_ids 0,1", "the engines sleep while it trains"),
]


@pytest.mark.parametrize(("gpus", "flags", "text"), WARNINGS)
def test_warnings(configure: Configure, gpus: int, flags: str, text: str) -> None:
    warnings = placed(configure, gpus, flags).warnings
    assert len(warnings) == bool(text)
    assert text in " ".join(warnings)


OTHER_LISTS = "--inference_gpu_ids 0 --teacher_gpu_ids 1"
REFUSALS = [
    (2, "--trainer_gpu_ids 2", 3, "trainer_gpu_ids names GPU 2, the machine has 2", "0 to 1"),
    (0, "--inference_gpu_ids 0", 3, "the machine has 0", "leave inference_gpu_ids out"),
    (2, "--inference_gpu_ids 0,1", 2, "none is left for the trainer", "the same ones"),
    (2, "--trainer_gpu_ids 0,1", 2, "the student's engine needs 1 GPUs", "the same ones"),
    (2, f"{FULL_FT} --trainer_gpu_ids 0,1", 2, "student's engine needs 1", "the same ones"),
    (1, "--inference.parallel.tp 2", 2, "(dp 1 × tp 2), and 1 is left", "inference.parallel"),
    (4, "--inference.parallel.dp 4", 2, "none is left for the trainer", "parallel.dp"),
    (4, "--trainer_gpu_ids 0 --inference.parallel.dp 4", 2, "needs 4 GPUs (dp 4 × tp 1)", "lower"),
    (8, "--inference.parallel.tp 3", 2, "tp = 3 does not divide the model's 32", "set it to 2"),
    (8, f"{SAMPLED} --teacher_inference.parallel.tp 3", 2, "teacher_inference.parallel.tp", "to 2"),
    (4, "--trainer_gpu_ids 0,1,2", 2, "3 GPUs do not divide orchestrator.batch_size", "take 2"),
    (4, f"{OTHER_LISTS} --trainer.loss.estimator full", 2, "needs all of the teacher's", "sampled"),
    (4, f"{SAMPLED} {OTHER_LISTS} --teacher_inference.share", 2, "share = true does", "one of"),
    (4, f"{FULL_FT} --teacher_inference.share", 2, "cannot serve this teacher", "leave it out"),
    (2, "--inference.engine embedded --inference_gpu_ids 0 --trainer_gpu_ids 1", 2,
     "the embedded engine is the trainer's own model", "vllm"),
    (3, "--inference.engine embedded --trainer_gpu_ids 0,1,2", 2, "do not divide", "take 2"),
]  # fmt: skip


@pytest.mark.parametrize(("gpus", "flags", "code", "what", "fix"), REFUSALS)
def test_refusals(
    configure: Configure, gpus: int, flags: str, code: int, what: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        placed(configure, gpus, flags)
    assert caught.value.exit_code == code
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.where


def test_lists_that_overlap_partly_are_configuration_errors(
    configure: Configure,
) -> None:
    flags = "--inference_gpu_ids 0 --teacher_gpu_ids 0 --trainer_gpu_ids 0,1"
    with pytest.raises(UserError, match="GPU 0 is in inference_gpu_ids and trainer_gpu_ids"):
        configure(*flags.split())
