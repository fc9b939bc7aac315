"""Generate text with 40% of the weights' bytes on the device, and check the result bit for bit.

Uses the folder that `make demo` makes, if it is there; else a small random Llama, whose answer is
token ids without a meaning.

    python examples/text_generation.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import superpipeline

FOLDER = Path("demo/SmolLM2-135M-Instruct")
QUESTION = "What is the capital of France?"

Decode = Callable[[torch.Tensor], str]


def read_folder(folder: Path) -> tuple[Any, torch.Tensor, Decode]:
    """The model, the question as token ids, and what turns ids into text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    turn = [{"role": "user", "content": QUESTION}]
    encoded = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def decode(ids: torch.Tensor) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return model, encoded["input_ids"], decode


def make_random() -> tuple[Any, torch.Tensor, Decode]:
    """The same with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model, torch.randint(10, 1024, (1, 12)), lambda ids: str(ids.tolist())


def main() -> None:
    """Stream, generate, explain, verify."""
    model, ids, decode = read_folder(FOLDER) if FOLDER.is_dir() else make_random()
    model = superpipeline.stream(model, weights="40%")
    pipe = superpipeline.handle(model)

    def answer() -> Any:
        return model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=16,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    with torch.no_grad():
        tokens = answer().sequences[0, ids.shape[1] :]
        print(pipe.explain())
        print(f"answer: {decode(tokens)}")
        print(pipe.verify_call(answer))


if __name__ == "__main__":
    main()
