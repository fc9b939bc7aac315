"""Writes a Llama of any size with random bf16 weights; it is never in memory as a whole.

    python -m benchmarks.cpu_disk.random_llama FOLDER --layers 17 --hidden 2048 --vocab 16384
    python -m benchmarks.cpu_disk.random_llama FOLDER --layers 60 --only 0,25,59

`--only`: one file, in which all other layers are holes: zeros that take no disk. A layer of zeros
adds nothing to what goes through it, so such a model is the one of these layers alone.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHARD_BYTES = 256 * 2**20
_NOISE = 16 * 2**20  # numbers drawn; every weight is a stretch of them, each from another place
_STEP = 7919 * 64


def llama_config(*, layers: int, hidden: int, intermediate: int, vocab: int) -> LlamaConfig:
    """Heads of 64, four query heads for each key; the head is no copy of the embedding."""
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate,
        vocab_size=vocab, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256), tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    return config


def shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Every weight's name and shape."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


class Noise:
    """Random weights as long as one asks for, drawn once; two in a row are not alike."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(_NOISE, generator=generator)
        self._numbers = (drawn * 0.02).to(torch.bfloat16)
        self._begin = 0

    def weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The next one. Norms are ones, as in a model that was just built."""
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        self._begin = (self._begin + _STEP) % _NOISE
        turned = self._numbers.roll(-self._begin)
        times = -(-shape.numel() // _NOISE)
        return turned.repeat(times)[: shape.numel()].reshape(shape)


def write(folder: Path, config: LlamaConfig, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes `config.json`, the shards and their index; returns the weights' bytes.

    Costs one shard of memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    noise, groups = Noise(), list(_shards(shapes(config), shard_bytes))
    places: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {key: noise.weight(key, shape) for key, shape in group.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(names: dict[str, torch.Size], most: int) -> Iterator[dict[str, torch.Size]]:
    group: dict[str, torch.Size] = {}
    for name, shape in names.items():
        used = sum(other.numel() * 2 for other in group.values())
        if group and used + shape.numel() * 2 > most:
            yield group
            group = {}
        group[name] = shape
    yield group


def write_sparse(folder: Path, config: LlamaConfig, only: tuple[int, ...]) -> int:
    """Writes `config.json` and one file in which only these layers are not zero; as `write`."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    noise, header, total = Noise(), {}, 0
    for name, shape in shapes(config).items():
        begin, total = total, total + shape.numel() * 2
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [begin, total]}
    text = json.dumps(header).encode()
    # To a whole page, so that files of other sizes have the weights at addresses that are alike.
    text += b" " * (-(8 + len(text)) % 4096)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, entry in header.items():
            if _layer_of(name) in (None, *only):
                file.seek(start + entry["data_offsets"][0])
                weight = noise.weight(name, torch.Size(entry["shape"]))
                file.write(weight.view(torch.uint8).numpy())
        file.truncate(start + total)
    return total


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--only")
    args = parser.parse_args()
    config = llama_config(
        layers=args.layers, hidden=args.hidden, intermediate=args.intermediate, vocab=args.vocab
    )
    if args.only is None:
        print(write(args.folder, config))
    else:
        print(write_sparse(args.folder, config, tuple(int(n) for n in args.only.split(","))))


if __name__ == "__main__":
    main()
