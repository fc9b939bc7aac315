"""`superpipeline run`: a language model answers a prompt under a bound, checked if you ask."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import superpipeline
from superpipeline.checkpoint import Checkpoint, find
from superpipeline.cli.figures import Figures, collect
from superpipeline.cli.generate import Generation, encode, first_difference, generate
from superpipeline.cli.request import Request, resolve_device
from superpipeline.errors import BudgetError, InputError, SuperpipelineError, VerificationError
from superpipeline.host import free_host_memory, return_freed_memory
from superpipeline.pipeline import Pipeline
from superpipeline.sizes import format_bytes

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2


def run(  # noqa: PLR0913 - one parameter for each option
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal language model.")],
    *,
    prompt: Annotated[str, typer.Option(help="Text to answer.")],
    weights: Annotated[
        str | None, typer.Option(help="Device bytes for weights: 6GiB, or 40% of the model.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Blocks on the device at once.")] = None,
    k_prime: Annotated[int | None, typer.Option(help="Blocks moved in one transfer.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host bytes for weights; the rest stays on disk.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0 or cpu.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")
    ] = "auto",
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Continue the prompt as plain text.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with the plain model, bit for bit.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure to this file.")
    ] = None,
) -> None:
    """Answer a prompt with a language model under a bound on its weights' device memory."""
    try:
        request = Request(
            model=model,
            prompt=prompt,
            device=resolve_device(device),
            weights=weights,
            k=k,
            k_prime=k_prime,
            host_memory=host_memory,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            chat_template=not no_chat_template,
            verify=verify,
            json_file=json_file,
        )
        request.check()
        _answer(request)
    except (InputError, BudgetError) as error:
        raise _exit(error, EXIT_BAD_INPUT) from error
    except SuperpipelineError as error:
        raise _exit(error, EXIT_FAILED) from error


def _exit(reason: object, code: int) -> typer.Exit:
    typer.echo(f"superpipeline: {reason}", err=True)
    return typer.Exit(code)


def _answer(request: Request) -> None:
    """Run the plain model if it is to be compared with, load, generate, report."""
    tokenizer, checkpoint = _find(request)
    inputs = encode(tokenizer, request.prompt, chat_template=request.chat_template)
    inputs = {name: ids.to(request.device) for name, ids in inputs.items()}
    # First, so that the plain model's memory is free again when the other takes its own.
    plain = _plain_generation(checkpoint, inputs, request) if request.verify else None
    model = _load(request)
    handle = superpipeline.handle(model)
    try:
        printer = _text_printer(tokenizer)
        streamed = _generation(model, inputs, request, printer)
        text = tokenizer.decode(streamed.token_ids, skip_special_tokens=True)
        # Before the check: it may run the model again, and these figures are of one run.
        figures = collect(request, handle, streamed, plain=plain, text=text, dtype=_dtype(model))
        problem = None
        if request.verify:
            problem = _problem(handle, plain, streamed, lambda: _generation(model, inputs, request))
            figures = replace(figures, verified=problem is None)
    finally:
        handle.close()
    _report(figures, request, problem)


def _find(request: Request) -> tuple[Any, Checkpoint]:
    """The tokenizer, and where the weights are."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # Its notes on unused sampling options and its progress bars are about no decision of the user.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _loading(request, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(request.model)
    with _loading(request):
        return tokenizer, find(request.model)


def _load(request: Request) -> Any:
    """The model, streamed from disk."""
    from transformers import AutoModelForCausalLM

    with _loading(request):
        return superpipeline.load(
            request.model,
            weights=request.weights,
            host_memory=request.host_memory,
            k=request.k,
            k_prime=request.k_prime,
            device=request.device,
            dtype=request.dtype,
            model_class=AutoModelForCausalLM,
        )


@contextmanager
def _loading(request: Request, part: str = "") -> Iterator[None]:
    """Errors of transformers as one line."""
    try:
        yield
    except SuperpipelineError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"cannot load {part}{request.model}: {reason}") from error


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _text_printer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _generation(
    model: Any, inputs: dict[str, torch.Tensor], request: Request, printer: Any | None = None
) -> Generation:
    return generate(
        model,
        inputs,
        max_new_tokens=request.max_new_tokens,
        keep_logits=request.verify,
        printer=printer,
    )


def _plain_generation(
    checkpoint: Checkpoint, inputs: dict[str, torch.Tensor], request: Request
) -> Generation | None:
    """What the model gives without Superpipeline; None where it does not fit, here or there."""
    if _plain_bytes(checkpoint, request.dtype) > free_host_memory() * 3 // 4:
        return None
    from transformers import AutoModelForCausalLM

    with _loading(request):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=request.dtype)
    try:
        model.to(request.device)
        return _generation(model, inputs, request)
    except torch.OutOfMemoryError:
        return None
    finally:
        del model
        gc.collect()
        return_freed_memory()
        if request.device.type != "cpu":
            torch.accelerator.empty_cache()


def _plain_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    if dtype == "auto":
        return checkpoint.num_bytes
    width = getattr(torch, dtype).itemsize
    return sum(
        tensor.numel() * (width if tensor.is_floating_point() else tensor.itemsize)
        for tensor in checkpoint.tensors().values()
    )


def _problem(
    handle: Pipeline,
    plain: Generation | None,
    streamed: Generation,
    generate_again: Callable[[], Generation],
) -> str | None:
    """Why the run is not verified, in words; None when it is."""
    if handle.stats().streamed_bytes == 0:
        weight_bytes = format_bytes(handle.plan.weight_bytes)
        return (
            f"nothing was streamed, so equal results prove nothing; the model has {weight_bytes} "
            "of weights, give a smaller --weights"
        )
    if plain is not None:
        return first_difference(plain, streamed)
    # The plain model does not fit: the handle compares with one that holds a block at a time.
    try:
        check = handle.verify_call(lambda: generate_again()[:2])
    except VerificationError as error:
        return str(error)
    return None if check.equal else str(check)


def _report(figures: Figures, request: Request, problem: str | None) -> None:
    """Print the figures, write them, and end with the verdict."""
    typer.echo()
    figures.print_table()
    if request.json_file is not None:
        figures.write_json(request.json_file)
    if problem is not None:
        raise _exit(f"NOT verified: {problem}", EXIT_FAILED)
    if request.verify:
        typer.echo(f"verified: {figures.num_tokens} tokens, logits bit-equal to the plain model's")
