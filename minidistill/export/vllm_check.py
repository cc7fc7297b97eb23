"""Log-probs of given tokens in vLLM, in a process of its own: `python -m …vllm_check FILE`.

FILE has a JSON object: `model`, `revision`, `tokenizer`, `trust_remote_code`, `dtype`, `adapter` (a
folder, or null), its largest `rank` and its `targets`, `cache_bytes` (null for vLLM's choice) and
`rows` of token ids. The answer is written to FILE.out: the log-prob of each id but the first, given
those before it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(path: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(path.read_text())
    options: dict[str, Any] = {}
    if job["adapter"]:
        # not of the head: vLLM's CPU kernels cannot score prompts if it may have an adapter
        options = {
            "enable_lora": True,
            "max_lora_rank": job["rank"],
            "lora_target_modules": job["targets"],
        }
    if job["cache_bytes"]:
        options |= {"kv_cache_memory_bytes": job["cache_bytes"]}
    longest = max(map(len, job["rows"])) + 1
    engine: Any = LLM(
        job["model"],
        tokenizer=job["tokenizer"],
        dtype=job["dtype"],
        max_model_len=max(64, longest),
        max_num_seqs=len(job["rows"]),
        enforce_eager=True,
        revision=job["revision"],
        trust_remote_code=job["trust_remote_code"],
        **options,
    )
    adapter = LoRARequest("exported", 1, job["adapter"]) if job["adapter"] else None
    outputs = engine.generate(
        [{"prompt_token_ids": row} for row in job["rows"]],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
        lora_request=adapter,
        use_tqdm=False,
    )
    rows = []
    for ids, output in zip(job["rows"], outputs, strict=True):
        known = output.prompt_logprobs or []
        rows.append([known[i][ids[i]].logprob for i in range(1, len(ids))])
    path.with_name(f"{path.name}.out").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
