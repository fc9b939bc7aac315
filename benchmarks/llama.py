"""How close is streamed inference of a Llama to the physical limit, at several bounds?

Prefill 1x2048 and 8x2048, and 16 decode steps, beside the plain model in the same run, which also
gives the bits that every row is compared with. The floor is max(plain time, (bytes of all blocks -
bound) / link rate): no choice of residents can save more than the bound. It does not depend on what
Superpipeline chose to stream.

    python -m benchmarks.llama                      # 8B, on a GPU
    python -m benchmarks.llama --tiny --device cpu  # a rehearsal
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import superpipeline
from benchmarks.record import save, table

EIGHT_B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip


def build(device: torch.device, *, tiny: bool) -> LlamaForCausalLM:
    """Random bf16 weights, drawn on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **(TINY if tiny else EIGHT_B),
        max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
        pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def prefill(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def decode(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, float]:
    """Logits of the last step, and the mean milliseconds of one step after a prefill of `ids`."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    begin = clock(ids.device)
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(-1)
        out = model(
            input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
        )
    return out.logits, (clock(ids.device) - begin) / steps


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> tuple[Any, float]:
    """The result and the median milliseconds, after two calls to warm up."""
    result = call()
    call()
    times = []
    for _ in range(repeats):
        begin = clock(device)
        call()
        times.append(clock(device) - begin)
    return result, median(times)


def measure(model: LlamaForCausalLM, args: argparse.Namespace) -> dict[str, tuple[Any, float]]:
    """Each workload's result (for comparison) and its milliseconds."""
    device = torch.device(args.device)
    torch.manual_seed(1)
    length = 32 if args.tiny else 2048
    ids = torch.randint(1, 1000, (8, length)).to(device)
    results = {
        f"prefill 1x{length}": timed(lambda: prefill(model, ids[:1]), device, args.repeats),
        f"prefill 8x{length}": timed(lambda: prefill(model, ids), device, args.repeats),
    }
    steps = 4 if args.tiny else 16
    decode(model, ids[:1, :128], 2)
    runs = [decode(model, ids[:1, :128], steps) for _ in range(3)]
    results["decode, a step"] = (runs[0][0], median(ms for _, ms in runs))
    return results


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def rate_of_these_weights(pipe: superpipeline.Pipeline) -> float:
    """Bytes a second of copying every block once, back to back, without compute: what the link does
    with these very bytes, which on a large host may lie far from the GPU."""
    engine = pipe.engine
    assert engine is not None
    engine.streams.synchronize()
    begin = time.perf_counter()
    for block in engine.blocks:
        engine.streams.copy(block.runs)
    engine.streams.synchronize()
    seconds = time.perf_counter() - begin
    engine.reset()
    return sum(block.num_bytes for block in engine.blocks) / seconds


def rows_for(
    model: LlamaForCausalLM, bound: str, plain: dict[str, tuple[Any, float]], args: Any
) -> list[dict[str, Any]]:
    device = torch.device(args.device)
    begin = clock(device)
    superpipeline.stream(model, weights=bound, device=device)
    setup_s = (clock(device) - begin) / 1e3
    pipe = superpipeline.handle(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    measured = measure(model, args)
    print(pipe.explain())
    work = pipe.plan.workload
    in_blocks = sum(work.weights[w].num_bytes for w in {w for b in work.blocks for w in b.weights})
    link_ms = max(0, in_blocks - (pipe.plan.bound_bytes or 0)) / pipe.link_rate * 1e3
    own_rate = rate_of_these_weights(pipe) / 1e9
    return [
        {
            "workload": name, "bound": bound, "plain ms": plain[name][1], "ms": ms,
            "floor ms": (floor := max(plain[name][1], link_ms)), "ratio": ms / floor,
            "equal": torch.equal(result, plain[name][0]),
            "weights GiB": pipe.plan.device_bytes / 2**30, "peak GiB": peak_gib(device),
            "link GB/s": pipe.link_rate / 1e9, "own GB/s": own_rate, "setup s": setup_s,
        }
        for name, (result, ms) in measured.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bounds", default="25%,50%,75%,100%")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with torch.no_grad():
        model = build(torch.device(args.device), tiny=args.tiny)
        measure(model, args)  # the clocks of GPU and host settle
        plain = measure(model, args)
        rows = []
        for bound in args.bounds.split(","):
            rows += rows_for(model, bound, plain, args)
    print(table(rows))
    print(save("llama-tiny" if args.tiny else "llama-8b", rows, args.out))


if __name__ == "__main__":
    main()
