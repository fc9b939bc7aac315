"""Fine-tune a language model under a bound on its weights' device memory, and check every loss.

The model is SmolLM2-135M from the folder that `make demo` makes, or with `--tiny` a small random
one. The text ships with Python: the language reference that `help()` shows.

    python examples/finetune.py --weights 40% --verify         # all weights; compares bit for bit
    python examples/finetune.py --lora --activations recompute --steps 10 --save run
    python examples/finetune.py --lora --activations recompute --steps 20 --resume run
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import superpipeline

FOLDER = Path("demo/SmolLM2-135M-Instruct")
MODES = ("keep", "recompute", "offload", "recompute+offload")
console = Console(highlight=False, markup=False, soft_wrap=True)


# ---- the model and the text ---------------------------------------------------------------------


def build(args: argparse.Namespace) -> nn.Module:
    """The model with what trains of it; the same every time."""
    torch.manual_seed(args.seed)
    model: Any
    if args.tiny:
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False
    if args.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
        model = get_peft_model(model, lora)
    return model.train()


def read_text(args: argparse.Namespace) -> torch.Tensor:
    """The manual as rows of `--length` tokens, in a random order that is the same every time."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    if args.tiny:
        tokens = torch.tensor([*text.encode()[:50_000]])
    else:
        tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))]


# ---- the loop, which knows nothing of streaming -------------------------------------------------


class Loop(NamedTuple):
    """What a training step needs.

    Attributes:
        stepped: the parameters that the optimizer steps.
        after_backward, after_step: what the check does there; nothing else does.
    """

    model: nn.Module
    stepped: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None


def train(loop: Loop, args: argparse.Namespace, begin: int, title: str) -> dict[int, float]:
    """Trains from step `begin` on; every loss."""
    rows, losses = read_text(args), {}
    for step in shown(range(begin, args.steps), title):
        started = time.perf_counter()
        chosen = torch.arange(step * args.batch, (step + 1) * args.batch) % len(rows)
        ids = rows[chosen].to(args.device)
        loss = loop.model(input_ids=ids, labels=ids).loss
        loss.backward()
        loop.after_backward()
        nn.utils.clip_grad_norm_(loop.stepped, 1.0)
        loop.optimizer.step()
        loop.schedule.step()
        loop.optimizer.zero_grad()
        loop.after_step()
        losses[step] = loss.item()
        seconds = time.perf_counter() - started
        console.print(f"{title}  step {step + 1:3}  loss {losses[step]:.6f}  {seconds:.2f} s")
    return losses


def shown(steps: range, title: str) -> Iterator[int]:
    """The steps, with a bar where somebody is there to see it."""
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        yield from bar.track(steps)


def make_optimizer(weights: list[nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=args.lr, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LinearLR(optimizer, start_factor=0.1, total_iters=10)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---- streamed -----------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        digest: of every bit of what was trained.
        host: names of what was trained on the host.
    """

    losses: dict[int, float]
    digest: str
    host: set[str]


def train_streamed(args: argparse.Namespace) -> Result:
    """The ordinary loop, after one call of `stream`."""
    model = superpipeline.stream(
        build(args), weights=args.weights, activations=args.activations, device=args.device,
        param_dtype=torch.bfloat16 if args.bf16 else None,
    )  # fmt: skip
    pipe = superpipeline.handle(model)
    optimizer = make_optimizer(trained(model), args)
    if args.lazy:
        optimizer = pipe.optimizer(optimizer)
    schedule = make_schedule(optimizer)
    begin = 0
    if args.resume:
        found = superpipeline.load_checkpoint(
            args.resume, model, optimizer=optimizer, schedule=schedule
        )
        begin = found["step"]
        console.print(f"goes on from {args.resume}, saved after step {begin}")
    else:
        torch.manual_seed(args.seed)
    losses = train(Loop(model, trained(model), optimizer, schedule), args, begin, "streamed")
    if args.save:
        superpipeline.save_checkpoint(
            args.save, model, frozen=not args.lora,
            optimizer=optimizer, schedule=schedule, step=args.steps,
        )  # fmt: skip
        console.print(f"saved to {args.save}")
    with pipe.weights():
        host = {n for n, p in model.named_parameters() if p.requires_grad and not p.is_cuda}
        result = Result(losses, digest(trained(model)), host)
    report(pipe, max(args.steps - begin, 1))
    pipe.close()
    return result


def report(pipe: superpipeline.Pipeline, num_steps: int) -> None:
    """What the weights took, and what moved."""
    stats, plan, mib = pipe.stats(), pipe.plan, 2**20
    peak, moved = stats.peak_device_bytes / mib, stats.streamed_bytes / num_steps / mib
    backward = stats.backward_streamed_bytes / num_steps / mib
    console.print(
        f"weights {plan.weight_bytes / mib:.0f} MiB, on the device at most {peak:.0f}; streamed "
        f"{moved:.0f} MiB a step, {backward:.0f} of them in the backward"
    )
    if not stats.backward_streamed_bytes:
        sys.exit("nothing was streamed in the backward; give a smaller --weights")


def digest(weights: list[nn.Parameter]) -> str:
    found = hashlib.sha256()
    for parameter in weights:
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


# ---- the check ----------------------------------------------------------------------------------


def train_plain(args: argparse.Namespace, host: set[str]) -> Result:
    """The same from the first step on, without Superpipeline."""
    model = build(args).to(args.device)
    masters = masters_of(model, host, in_bfloat16=args.bf16)
    pairs = [(masters[name], p) for name, p in model.named_parameters() if name in masters]
    stepped = [masters.get(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def hand_over() -> None:
        for master, parameter in pairs:
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.to("cpu", master.dtype), None

    def refresh() -> None:
        for master, parameter in pairs:
            parameter.data.copy_(master.data)

    optimizer = make_optimizer(stepped, args)
    schedule = make_schedule(optimizer)
    torch.manual_seed(args.seed)
    loop = Loop(model, stepped, optimizer, schedule, hand_over, refresh)
    return Result(train(loop, args, 0, "plain   "), digest(stepped), host)


def masters_of(model: nn.Module, host: set[str], *, in_bfloat16: bool) -> dict[str, nn.Parameter]:
    """A master for each weight that computes on another device, or in another dtype, than it is
    stepped in: as a plain loop with such weights has."""
    masters = {}
    for name, parameter in model.named_parameters():
        if in_bfloat16 or (name in host and parameter.is_cuda):
            value = parameter.detach().to("cpu", copy=True)
            masters[name] = nn.Parameter(value, parameter.requires_grad)
        if in_bfloat16:
            parameter.data = parameter.data.to(torch.bfloat16)
    return masters


def is_same(streamed: Result, plain: Result) -> bool:
    """Prints the verdict."""
    wrong = [step for step, loss in streamed.losses.items() if loss != plain.losses[step]]
    if wrong:
        step = wrong[0]
        pair = streamed.losses[step].hex(), plain.losses[step].hex()
        console.print(f"NOT verified: the loss of step {step + 1} is {pair[0]}, plain {pair[1]}")
    elif streamed.digest != plain.digest:
        console.print("NOT verified: the losses are equal, and the trained weights are not")
    else:
        count = len(streamed.losses)
        console.print(f"verified: {count} losses and all trained weights bit-equal to the plain's")
        return True
    return False


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="40%", help="device bytes for weights: 6GiB, 40%%")
    parser.add_argument("--activations", choices=MODES, default="keep")
    parser.add_argument("--lora", action="store_true", help="train a LoRA, not all weights")
    parser.add_argument("--lazy", action="store_true", help="step block by block, overlapped")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 copies of fp32 weights")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2, help="rows of text a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--tiny", action="store_true", help="a small random model instead")
    parser.add_argument("--verify", action="store_true", help="compare with the plain model")
    parser.add_argument("--save", type=Path, help="folder for a checkpoint after the last step")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to go on from")
    return parser.parse_args()


def main() -> None:
    """Train, and with --verify train again without Superpipeline."""
    args = parse()
    logging.disable_progress_bar()
    if not args.tiny and not args.model.is_dir():
        sys.exit(f"there is no folder {args.model}: run `make demo` first, or give --tiny")
    if args.verify and args.device != "cpu":  # else the plain model differs from itself
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        streamed = train_streamed(args)
    except superpipeline.SuperpipelineError as error:
        sys.exit(f"superpipeline: {error}")
    if args.verify and not is_same(streamed, train_plain(args, streamed.host)):
        sys.exit(1)


if __name__ == "__main__":
    main()
