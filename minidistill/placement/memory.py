"""Estimates of the memory that the trainer needs, by part, from a model's sizes.

The activations are those of a dense decoder like Llama's and Qwen's, as transformers and peft run
it; tests compare them with a measured step. Widths per token: H hidden, I intermediate, Q queries,
K keys. L is the longest sequence, w the bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minidistill.config import Config
from minidistill.placement.attention import FLASH
from minidistill.placement.limits import completion_tokens, fp32_copy_bytes
from minidistill.placement.model_shape import ModelShape, module_rank
from minidistill.placement.placement import Placement
from minidistill_kernels.op import chunk_tokens

MemoryBreakdown = dict[str, int]
"""Bytes by the name of a part."""


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """How much of each kind of token is in a micro-batch."""

    tokens: int
    """All of them, padding included."""
    longest: int
    """Tokens of the longest sequence."""
    completions: int
    """Completion tokens. Only these reach the LM head."""


def largest_micro_batch(config: Config, placement: Placement) -> MicroBatchSize:
    """The largest micro-batch that a step can have: every sequence has the longest length."""
    longest, orchestrator = placement.max_length, config.orchestrator
    together, group = largest_group(config, placement)
    completions = together * completion_tokens(config, longest)
    rank_tokens = orchestrator.batch_size // placement.ranks * group // together
    tokens = min(max(placement.micro_batch_tokens, longest), rank_tokens)
    return MicroBatchSize(tokens, longest, tokens * completions // group)


def largest_group(config: Config, placement: Placement) -> tuple[int, int]:
    """Sequences that share a prompt in a pass, and their tokens if they are the longest."""
    orchestrator = config.orchestrator
    together = orchestrator.rollouts_per_example if placement.attention.shares_prompts else 1
    more = (together - 1) * completion_tokens(config, placement.max_length)
    return together, placement.max_length + more


def trainer_memory(
    config: Config,
    placement: Placement,
    shape: ModelShape,
    size: MicroBatchSize,
    device: torch.device,
    itemsize: int,
    shards: int = 1,
    teacher_shape: ModelShape | None = None,
) -> MemoryBreakdown:
    """Bytes on one rank at the trainer's peak, which is in the backward pass.

    `itemsize` is that of a base weight. The weights, and under full fine-tuning the gradients and
    the optimizer's state, are split into `shards`; with more than one, layers and the embedding are
    gathered for use. `teacher_shape` is given if the teacher is another model.
    """
    lora, teacher = config.trainer.model.lora, config.orchestrator.teacher_model
    weights = shape.weight_bytes(itemsize, config.model.quantization)
    in_trainer = placement.teacher.scorer == "trainer"
    trained = shape.adapter(lora) if lora else shape.text
    averaged = teacher.update == "ema"
    parts: MemoryBreakdown = {"weights": weights // shards}
    if shards > 1:
        outside = shape.parameters - shape.body  # the embedding, the head, a vision tower
        unsharded = 2 * shape.layer_parameters + outside
        parts["gathered layers"] = unsharded * itemsize
    if lora:
        width = _adapter_itemsize(placement)
        fp32_copy = fp32_copy_bytes(width)
        ema = width + fp32_copy if averaged else 0
        parts["adapter"] = (width + ema) * trained
        parts["gradients"], parts["optimizer"] = 4 * trained, (8 + fp32_copy) * trained
    else:
        fp32_copy = fp32_copy_bytes(itemsize)
        if averaged:
            parts["reference copy"] = (weights + fp32_copy * trained) // shards
        elif teacher.update == "frozen" and in_trainer:
            parts["reference copy"] = weights // shards
        parts["gradients"] = 4 * trained // shards  # summed in fp32 whatever the weights' dtype
        parts["optimizer"] = (8 + fp32_copy) * trained // shards
        parts["head gradient"] = 2 * 4 * shape.vocab * shape.hidden  # in fp32, and a temporary
    if teacher_shape is not None and in_trainer:
        parts["reference copy"] = teacher_shape.parameters * itemsize // shards
    parts |= _unpacked_weights(config, placement, shape, itemsize)
    parts["activations"] = activations(config, placement, shape, size, itemsize)
    parts["head chunk"] = head_chunk(placement, shape, size, device, itemsize)
    if in_trainer:
        parts["teacher's hidden states"] = size.completions * shape.hidden * itemsize
    return parts


def _unpacked_weights(
    config: Config, placement: Placement, shape: ModelShape, itemsize: int
) -> MemoryBreakdown:
    """What the layer with the largest weight holds while it works: a 4-bit weight in the compute
    dtype; with DoRA the weight, its update, their sum, and the identity that gives the update."""
    lora, size = config.trainer.model.lora, 0
    largest = max((x.inputs * x.outputs for x in shape.linears), default=0)
    if config.model.quantization is not None:
        size += largest * itemsize
    if lora and lora.use_dora:
        inputs = max((x.inputs for x in shape.adapted(lora.target_modules)), default=0)
        size += (3 * largest + inputs**2) * _adapter_itemsize(placement)
    return {"unpacked weights": size} if size else {}


def evaluation_memory(
    config: Config,
    placement: Placement,
    shape: ModelShape,
    size: MicroBatchSize,
    device: torch.device,
    itemsize: int,
    shards: int = 1,
) -> MemoryBreakdown:
    """Bytes of a pass without gradients, for a KL between two views, besides the models.

    One layer works at a time. Both views' hidden states are kept, and two chunks of fp32 logits.
    Models whose weights are sharded are gathered for such a pass.
    """
    layer = layer_activations(config, placement, shape, size, itemsize)
    layer += 2 * shape.hidden * itemsize  # its input and output
    chunk = chunk_tokens(size.completions, shape.vocab, 0, device)
    parts = {
        "activations": size.tokens * layer,
        "hidden states": 2 * size.completions * shape.hidden * itemsize,
        "head chunk": 2 * 4 * chunk * shape.vocab,
        **_unpacked_weights(config, placement, shape, itemsize),
    }
    if shards > 1:
        parts["gathered weights"] = shape.parameters * itemsize * (shards - 1) // shards
    return parts


def activations(
    config: Config, placement: Placement, shape: ModelShape, size: MicroBatchSize, itemsize: int
) -> int:
    """Bytes that are saved for a micro-batch's backward pass, and those it works with.

    A checkpointed layer saves only its input. One such layer at a time is recomputed.
    """
    saved = layer_activations(config, placement, shape, size, itemsize)
    layers, inputs = shape.layers, shape.hidden * itemsize
    total = saved * layers
    if freq := placement.ac_freq:
        checkpointed = -(-layers // freq)
        others = layers - checkpointed
        # the layers after the last checkpointed one are done when that one is recomputed
        after = layers - 1 - (checkpointed - 1) * freq
        total = saved * max(others, others - after + 1) + inputs * checkpointed
    # the last norm's input and output, and the gradients in flight
    ends = shape.hidden * (4 + itemsize)
    working = 4 * (2 * shape.intermediate + 2 * shape.hidden)
    return size.tokens * (total + ends + working)


def layer_activations(
    config: Config, placement: Placement, shape: ModelShape, size: MicroBatchSize, itemsize: int
) -> int:
    """Bytes per token that one layer saves for its backward pass.

    norms        2 · 4H in fp32, and w · 2H of outputs that fp32 adapters or trained weights read
    q, k norm    4 (Q + K) if the model has them
    attention    w (Q + 2 keys and values + Q), keys and values widened to Q under a mask; 4 a head
    mask         w L with padding, w · tokens if packing needs a mask, none without one
    MLP          w · 3I: gate, its activation, up
    adapters     4 · inputs + 4 · rank for each adapted layer in fp32 on a narrower base; in the
                 base's dtype w · inputs once for layers that read the same, and w · rank;
                 with DoRA twice the outputs

    A CPU computes norms' outputs and the inner products of gated MLPs again in fp32. There an MLP
    saves w · 2I, and adapters after a norm or in an MLP save w · rank. With a mask this is not
    counted: attention then keeps about as much more.
    """
    w, lora, attention = itemsize, config.trainer.model.lora, placement.attention
    h, i, q, k = shape.hidden, shape.intermediate, shape.attention, shape.keys
    unmasked = attention.shares_prompts or attention.implementation == FLASH
    kept = k * _gathered_keys(config, placement) if unmasked else q
    lean = unmasked and _is_lean(config, placement)
    mlp = (2 if lean and shape.gated else 3) * w * i
    total = 2 * 4 * h + mlp + w * int(2 * q + 2 * kept) + 4 * shape.heads + 8
    width = size.tokens if attention.packed else size.longest
    if attention.implementation == "eager":
        total += shape.heads * width * (4 if w == 4 else 4 + w)
    elif not unmasked:
        total += w * width
    if shape.qk_norm:
        total += 4 * (q + k + shape.heads + shape.kv_heads)
    if lora is False:
        # outputs of norms, before and after their weight, and what the down projection reads
        total += 2 * 2 * w * h + w * i
        return total + (w * (q + k) if shape.qk_norm else 0)
    adapted = shape.adapted(lora.target_modules)
    adapter_itemsize = _adapter_itemsize(placement)
    total += adapter_itemsize * sum(module_rank(lora, x.name) for x in adapted) // shape.layers
    if lora.use_dora:  # the base's and the update's output, which the norm scales
        total += 2 * adapter_itemsize * sum(x.outputs for x in adapted) // shape.layers
    if w < adapter_itemsize:
        return total + 4 * sum(x.inputs for x in adapted) // shape.layers
    # adapters in the base's dtype save no copies: each input counts once
    if lean:
        adapted = tuple(x for x in adapted if not _computed_again(x.name, shape))
    blocks = {(x.name.rpartition(".")[0], x.inputs) for x in adapted}
    attended = {name for name, _ in blocks if name.endswith("attn")}
    distinct = sum(inputs for name, inputs in blocks if name not in attended)
    return total + w * (distinct + h * len(attended)) // shape.layers


def _is_lean(config: Config, placement: Placement) -> bool:
    """Whether layers run as `trainer/lean_layers.py` has them."""
    lora = config.trainer.model.lora
    if lora is False or placement.trainer_gpus or placement.sharded:
        return False
    fp32 = placement.dtype == "float32" and _adapter_itemsize(placement) == 4
    return fp32 and not lora.use_dora and not lora.dropout


def _computed_again(name: str, shape: ModelShape) -> bool:
    """Whether a lean layer's input is not kept."""
    layer = name.rpartition(".")[2]
    if layer == "down_proj":
        return shape.gated
    return layer in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def _gathered_keys(config: Config, placement: Placement) -> float:
    """Keys that a GPU's kernel reads per token of a row: each completion has its prompt's too."""
    if not (placement.attention.shares_prompts and placement.trainer_gpus):
        return 1.0
    if placement.dtype == "float32":
        return 1.0
    completion = completion_tokens(config, placement.max_length)
    together, prompt = config.orchestrator.rollouts_per_example, placement.max_length - completion
    return (prompt + together * placement.max_length) / (prompt + together * completion)


def _adapter_itemsize(placement: Placement) -> int:
    """Bytes of an adapter's parameter as it computes."""
    return int(getattr(torch, placement.adapter_dtype or placement.dtype).itemsize)


def head_chunk(
    placement: Placement,
    shape: ModelShape,
    size: MicroBatchSize,
    device: torch.device,
    itemsize: int,
) -> int:
    """Bytes of a chunk of the student's logits in fp32, of the teacher's logits or the gradient's,
    and of the hidden states and their gradient."""
    chunk = chunk_tokens(size.completions, shape.vocab, 0, device)
    narrow = device.type == "cuda" and itemsize < 4
    second = itemsize if narrow else 4 * (placement.teacher.scorer == "trainer")
    return chunk * shape.vocab * (4 + second) + 2 * size.completions * shape.hidden * itemsize
