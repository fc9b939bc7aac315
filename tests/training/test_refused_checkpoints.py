"""What cannot be saved, or does not fit, is refused, and nothing was changed; damage is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from superpipeline import DiskError, InputError
from superpipeline.resume import load_checkpoint, save_checkpoint
from training.cases import CASES
from training.reference import assert_same_tensors
from training.saving import adamw, assert_clean, stepped, tensors_of

LOADED_WRONGLY: dict[str, tuple[Any, str]] = {
    "other_model": (lambda m, o: {"model": nn.Linear(16, 16)}, "lacks bias"),
    "fewer_layers": (lambda m, o: {"model": m[:3]}, r"holds 3\.bias; it holds 3\.weight"),
    "other_dtype": (lambda m, o: {"model": m.half()}, r"float32 \[16, 16\], the model .*float16"),
    "other_shape": (lambda m, o: {"model": nn.Sequential(nn.Linear(16, 8), *[*m][1:])}, r"\[8, 16"),
    "other_optimizer": (
        lambda m, o: {"optimizer": torch.optim.SGD(m.parameters())}, "SGD of 8 .* AdamW of 8",
    ),
    "other_order": (
        lambda m, o: {"optimizer": adamw([*m.parameters()][::-1])}, "in another order",
    ),
    "fewer_parameters": (lambda m, o: {"optimizer": adamw([*m.parameters()][1:])}, "AdamW of 7"),
    "more_groups": (
        lambda m, o: {"optimizer": adamw([{"params": [p]} for p in m.parameters()])}, r"1 \+ 1",
    ),
    "no_such_object": (lambda m, o: {"scheduler": o}, "no state of 'scheduler', only of optimizer"),
    "a_number": (lambda m, o: {"step": 3}, r"load_checkpoint\(\.\.\.\)\['step'\]"),
    "no_checkpoint": (lambda m, o: {"folder": "elsewhere"}, "holds no checkpoint"),
    "a_file": (lambda m, o: {"folder": __file__}, "holds no checkpoint"),
    "not_a_model": (lambda m, o: {"model": o}, "got AdamW"),
}  # fmt: skip


@pytest.mark.parametrize("what", LOADED_WRONGLY)
def test_what_does_not_fit_changes_nothing(what: str, tmp_path: Path) -> None:
    model, optimizer = stepped()
    save_checkpoint(tmp_path, model, optimizer=optimizer, step=3)
    model, optimizer = stepped()
    change, message = LOADED_WRONGLY[what]
    given = {"folder": tmp_path, "model": model, "optimizer": optimizer} | change(model, optimizer)
    held = given["model"] if isinstance(given["model"], nn.Module) else model
    before, states = tensors_of(held), str(given["optimizer"].state_dict())
    rng = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        load_checkpoint(given.pop("folder"), given.pop("model"), **given)
    assert_same_tensors("weight", tensors_of(held), before)
    assert str(given["optimizer"].state_dict()) == states
    assert torch.equal(torch.get_rng_state(), rng)


SAVED_WRONGLY: dict[str, tuple[Any, str]] = {
    "a_function": ({"loss": print}, "one of step, loss holds builtins.print"),
    "a_lambda": ({"loss": lambda: 0}, "one of step, loss cannot be saved"),
    "a_path": ({"name": "../elsewhere", "value": nn.Linear(1, 1)}, "letters, digits"),
}


@pytest.mark.parametrize("what", SAVED_WRONGLY)
def test_what_could_not_be_loaded_is_not_saved(what: str, tmp_path: Path) -> None:
    state, message = SAVED_WRONGLY[what]
    if "name" in state:
        state = {state["name"]: state["value"]}
    model, _ = stepped()
    save_checkpoint(tmp_path, model, step=1)
    with pytest.raises(InputError, match=message):
        save_checkpoint(tmp_path, model, step=2, **state)
    assert load_checkpoint(tmp_path, model) == {"step": 1}
    assert_clean(tmp_path, 3)


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse()])
def test_what_the_format_cannot_hold(tensor: torch.Tensor, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.odd = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(InputError, match="odd is a Parameter"):
        save_checkpoint(tmp_path, model)
    save_checkpoint(tmp_path, model, frozen=False)


class Quantized(nn.Linear):
    """Keeps its scale out of everybody's sight, as 4-bit layers do."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight.requires_grad_(False)
        self.scale = 0.5

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = torch.tensor(self.scale)


def test_what_is_not_in_parameters_and_buffers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Quantized())
    with pytest.raises(InputError, match=r"1 \(Quantized\) keeps weight\.scale"):
        save_checkpoint(tmp_path, model)
    save_checkpoint(tmp_path, model, frozen=False)
    load_checkpoint(tmp_path, model)


def test_a_model_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    model = CASES["gpt2"].build()
    model.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(InputError, match="a folder of its own"):
            call(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "cut": ("model-*", lambda b: b[: len(b) // 2], "cut short"),
    "cut_state": ("state.optimizer-*", lambda b: b[: len(b) // 2], "is damaged"),
    "no_zip": ("state-*", lambda b: b"x" * len(b), "is damaged"),
    "no_header": ("model-*", lambda b: b[:100] + b[101:], "header"),
    "gone": ("state-*", None, "which is not there"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_noticed(what: str, tmp_path: Path) -> None:
    pattern, change, message = DAMAGES[what]
    model, optimizer = stepped()
    save_checkpoint(tmp_path, model, optimizer=optimizer)
    (path,) = tmp_path.glob(pattern)
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(content))
    with pytest.raises(DiskError, match=message):
        load_checkpoint(tmp_path, model, optimizer=optimizer)
