"""What `superpipeline run` was asked for, checked before anything is loaded."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from superpipeline import hub
from superpipeline.errors import InputError
from superpipeline.sizes import parse_bytes

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of one run, as given; `device` is resolved."""

    model: str
    prompt: str
    device: torch.device
    weights: str | None = None
    k: int | None = None
    k_prime: int | None = None
    host_memory: str | None = None
    max_new_tokens: int = 128
    dtype: str = "auto"
    chat_template: bool = True
    verify: bool = False
    json_file: Path | None = None

    def check(self) -> None:
        """Raise InputError for what can be seen to be wrong without loading the model."""
        _check_model(self.model)
        _check_memory(self.weights, self.k, self.k_prime)
        if self.host_memory is not None:
            _check_host_memory(self.host_memory, self.device)
        if not self.prompt.strip():
            raise InputError("--prompt is empty; give the text to answer")
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.json_file is not None and not self.json_file.absolute().parent.is_dir():
            raise InputError(f"--json: there is no folder {self.json_file.absolute().parent}")
        if importlib.util.find_spec("transformers") is None:
            raise InputError(
                "`superpipeline run` needs transformers: pip install 'superpipeline[hub]'"
            )


def _check_model(model: str) -> None:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"the folder {model} has no config.json: it holds no model")
    elif folder.exists():
        raise InputError(f"{model} is a file; give the folder that holds the model, or a hub id")
    elif hub.REPOSITORY.fullmatch(model) is None:
        raise InputError(f"there is no folder {model}, and it is not written like a hub id")


def _check_memory(weights: str | None, k: int | None, k_prime: int | None) -> None:
    if weights is not None and k is not None:
        raise InputError("--weights and --k both say how much goes on the device: give one of them")
    if k_prime is not None and k is None:
        raise InputError("--k-prime needs --k; with --weights the planner chooses it")
    if weights is None and k is None:
        raise InputError(
            "say how much of the device the weights may take: --weights 6GiB, --weights 40% "
            "(of the model's), or --k, a number of blocks"
        )
    if k is not None and k < 1:
        raise InputError(f"--k must be at least 1, got {k}")
    if k is not None and k_prime is not None and not 1 <= k_prime <= k:
        raise InputError(f"--k-prime must be between 1 and --k ({k}), got {k_prime}")
    if weights is not None:
        parse_bytes(weights, 1)  # only to see that it can be read: the total is not known yet


def _check_host_memory(host_memory: str, device: torch.device) -> None:
    parse_bytes(host_memory, 1)
    if device.type == "cpu":
        raise InputError(
            "--host-memory is for a GPU; on the CPU --weights bounds the host memory that weights "
            "take"
        )


def resolve_device(text: str | None) -> torch.device:
    """The device that `text` names, or the accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if text is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise InputError(f"--device {text!r} is no device; write it like cpu or cuda:0") from error
    num_devices = torch.accelerator.device_count() if accelerator is not None else 0
    known = device.type == "cpu" or (accelerator is not None and device.type == accelerator.type)
    if not known or (device.type != "cpu" and (device.index or 0) >= num_devices):
        kind = accelerator.type if accelerator is not None else ""
        names = ["cpu", *(f"{kind}:{index}" for index in range(num_devices))]
        raise InputError(f"--device {text}: this machine has {', '.join(names)}")
    return device
