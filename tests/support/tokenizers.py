"""Small tokenizers of the common kinds, with control tokens and a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The user says hello, and the assistant answers: it is 12 o'clock.\n",
    "x < y | z > 1 / 2; the end of a turn and the start of another, im-start: im_end!\n",
] * 4
CONTROL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(template: str | None = CHATML, *, eos: str = "<|im_end|>", **flags: Any) -> Any:
    """As GPT-2's and Qwen's: bytes, merged within words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False, special_tokens=["</s>"]
    )
    core.train_from_iterator(TEXT, trainer)  # "</s>" is also in the model's vocabulary
    return _with_control_tokens(core, template, eos, **flags)


def metaspace(template: str | None = CHATML, *, scheme: str = "first", **flags: Any) -> Any:
    """As Llama 2's: a space is a character of a word, and the first word gets one."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=[*map(chr, range(33, 127)), *"üï🧱"],
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
    )
    core.train_from_iterator(TEXT, trainer)
    return _with_control_tokens(core, template, "<|im_end|>", **flags)


def unigram(template: str | None = CHATML) -> Any:
    """Its vocabulary has "</s>", the most likely piece of that text."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
    )
    core.train_from_iterator(TEXT, trainer)
    return _with_control_tokens(core, template, "<|im_end|>")


def _with_control_tokens(
    core: Tokenizer,
    template: str | None,
    eos: str,
    special: bool = True,
    **flags: bool,
) -> Any:
    for token in CONTROL:
        flagged = special or token in ("<s>", "</s>")
        added = AddedToken(token, special=flagged, normalized=False, **flags)
        core.add_special_tokens([added]) if flagged else core.add_tokens([added])
    core.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer
