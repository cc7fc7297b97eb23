"""Tiny random models of many architectures, with a tokenizer of bytes and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
VLLM_SIZES = {  # that vLLM's attention takes
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
WINDOW = {"sliding_window": 16}
SLIDING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

# Model type and the fields of its configuration beside SIZES, by a name of ours
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "padded_vocabulary": ("llama", {"vocab_size": 384}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "mistral_window": ("mistral", WINDOW),
    "ministral": ("ministral", SLIDING),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {
            "final_logit_softcapping": 5.0, "attn_logit_softcapping": 1.0,
            "query_pre_attn_scalar": 8, **WINDOW,
        },
    ),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8, **SLIDING}),
    "granite": ("granite", {"logits_scaling": 8.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.5, **SLIDING}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.5}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 15.0}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "glm4": ("glm4", {}),
    "exaone4": ("exaone4", SLIDING),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.1}),
    "mixtral": ("mixtral", {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    "olmoe": ("olmoe", {"num_experts": 4, **EXPERTS}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, **EXPERTS, **SLIDING}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4, "n_group": 1, "topk_group": 1, **EXPERTS, "kv_lora_rank": 8,
            "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4,
        },
    ),
    "lfm2": ("lfm2", CONVOLUTION),
    "lfm2_conv_bias": ("lfm2", {**CONVOLUTION, "conv_bias": True}),
    "qwen3_next": (
        "qwen3_next",
        {**LINEAR_ATTENTION, "num_experts": 4, **EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_5": ("qwen3_5_text", LINEAR_ATTENTION),
    "falcon_h1": ("falcon_h1", {**MAMBA, "lm_head_multiplier": 0.5}),
    "granite_hybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"], **MAMBA, "num_local_experts": 4, **EXPERTS,
            "logits_scaling": 4.0, "shared_intermediate_size": 16,
        },
    ),
    "gemma3_vision": (
        "gemma3",
        {
            "vision_config": VISION, "mm_tokens_per_image": 4,
            "text_config": {"query_pre_attn_scalar": 8, **SLIDING},
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "vision_config": {
                "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16,
                "out_hidden_size": 32,
            },
            "text_config": {"rope_parameters": MROPE},
        },
    ),
    "mistral3": (
        "mistral3",
        {
            "vision_config": {**VISION, "model_type": "pixtral"},
            "text_config": {"model_type": "mistral", "sliding_window": None},
        },
    ),
}  # fmt: skip

# Close to others of the table
SIBLINGS = {
    "llama_biases", "ministral", "hyperclovax", "nanochat", "glm4", "exaone4", "stablelm",
    "starcoder2", "gpt_bigcode", "gptj", "olmoe", "falcon_h1", "granite_hybrid",
}  # fmt: skip
# peft refuses adapters on some layers of these
TARGETS = {"falcon_h1": "q_proj,v_proj,up_proj"}

CHATML = """\
{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def build(name: str, folder: Path, **sizes: Any) -> Path:
    """Save the model `name` in a folder of `folder`, in fp32, and return that.

    `sizes` replace those of SIZES and of the table.
    """
    from transformers import AutoConfig

    kind, fields = ARCHITECTURES[name]
    tokenizer = tiny_tokenizer()
    # a few more rows than tokens, as many models have
    ids = {"vocab_size": 280, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    if "text_config" in fields:
        text = {**SIZES, **ids, **fields["text_config"], **sizes}
        model_config = AutoConfig.for_model(kind, **{**ids, **fields, "text_config": text})
    else:
        model_config = AutoConfig.for_model(
            kind, **{**SIZES, "bos_token_id": 1, **ids, **fields, **sizes}
        )
    from minidistill.models.auto import model_class

    torch.manual_seed(0)
    model = model_class(model_config).from_config(model_config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)  # sharper distributions than a new model's
            else:  # biases begin at 0, norms at 1
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def tiny_tokenizer(template: str = CHATML) -> Any:
    """A tokenizer of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokens.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = template
    return tokenizer
