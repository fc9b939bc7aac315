"""One greedy generation, timed token by token, with the logits of each step if they are wanted."""

import time
from typing import Any, NamedTuple

import torch


class Generation(NamedTuple):
    """The new tokens of one generation, and when they came."""

    token_ids: torch.Tensor
    logits: tuple[torch.Tensor, ...]
    first_token_s: float
    seconds_per_token: float


class TokenClock:
    """A transformers streamer that notes when each token came, and hands it to a printer."""

    def __init__(self, printer: Any | None = None) -> None:
        self._printer = printer
        self._prompt_seen = False
        self._started_s = time.perf_counter()
        self._token_times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (the first call), then one token a call.

        transformers moves each token to the host before this call, so the time includes the work.
        """
        if self._prompt_seen:
            self._token_times_s.append(time.perf_counter())
        self._prompt_seen = True
        if self._printer is not None:
            self._printer.put(value)

    def end(self) -> None:
        """Pass on that the generation is over."""
        if self._printer is not None:
            self._printer.end()

    @property
    def first_token_s(self) -> float:
        """Seconds from the start to the first token: the prompt's pass, and discovery."""
        return self._token_times_s[0] - self._started_s

    @property
    def seconds_per_token(self) -> float:
        """Mean seconds of a token after the first; of the first if there is no other."""
        num_later = len(self._token_times_s) - 1
        if num_later == 0:
            return self.first_token_s
        return (self._token_times_s[-1] - self._token_times_s[0]) / num_later


def encode(tokenizer: Any, prompt: str, *, chat_template: bool) -> dict[str, torch.Tensor]:
    """The prompt's ids and mask; as one user turn where the tokenizer knows how."""
    if chat_template and tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    # Some tokenizers add more (token_type_ids) than causal models take.
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def generate(
    model: Any,
    inputs: dict[str, torch.Tensor],
    *,
    max_new_tokens: int,
    keep_logits: bool,
    printer: Any | None = None,
) -> Generation:
    """Generate greedily, whatever sampling the checkpoint's generation config asks for."""
    clock = TokenClock(printer)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=keep_logits,
    )
    num_prompt = inputs["input_ids"].shape[1]
    return Generation(
        token_ids=output.sequences[0, num_prompt:].cpu(),
        logits=tuple(step.cpu() for step in output.logits) if keep_logits else (),
        first_token_s=clock.first_token_s,
        seconds_per_token=clock.seconds_per_token,
    )


def first_difference(plain: Generation, streamed: Generation) -> str | None:
    """Where the two generations part, in words; None when ids and logits are bit-equal."""
    if len(plain.logits) != len(streamed.logits):
        return f"{len(streamed.logits)} tokens came, the plain model gave {len(plain.logits)}"
    for step, (expected, actual) in enumerate(zip(plain.logits, streamed.logits, strict=True)):
        if not _bit_equal(expected, actual):
            apart = (expected - actual).abs().max().item()
            return (
                f"the logits of token {step + 1} differ from the plain model's by up to {apart:.3g}"
            )
    if not torch.equal(plain.token_ids, streamed.token_ids):
        return "the logits are equal and the tokens are not"
    return None


def _bit_equal(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """Compare bytes: as numbers, -0.0 equals 0.0 and NaN differs from itself."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    return torch.equal(
        expected.contiguous().view(torch.uint8), actual.contiguous().view(torch.uint8)
    )
