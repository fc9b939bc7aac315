"""Weights that change between steps by other hands than the optimizer's, adapters, and resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import superpipeline
from training.cases import CASES
from training.reference import Tensors, assert_same_tensors, stream_within
from training.side_by_side import (
    everything,
    gradients,
    is_streamed,
    real_weights,
    sgd,
    side_by_side,
    train,
)

STEPPING = pytest.mark.parametrize("stepping", ["plain", "lazy"])


def stepped(model: nn.Module, optimizer: Optimizer, stepping: str) -> Optimizer:
    """The handle's optimizer where there is a handle and that is wanted."""
    if stepping == "lazy" and is_streamed(model):
        return superpipeline.handle(model).optimizer(optimizer)
    return optimizer


# ---- edits --------------------------------------------------------------------------------------


def data_in_place(weight: nn.Parameter) -> None:
    weight.data.mul_(0.5)


def data_replaced(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.5


def copied_into(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.copy_(weight * 0.5)


def through_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] *= 0.5


EDITS = (data_in_place, data_replaced, copied_into, through_numpy)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@STEPPING
def test_a_weight_edited_between_steps(edit: Callable[[nn.Parameter], None], stepping: str) -> None:
    """A stale device copy goes on being used: version counters do not see an edit through .data,
    nor one through numpy, nor a fused optimizer's."""

    def script(model: nn.Module) -> Tensors:
        optimizer = stepped(model, torch.optim.AdamW(model.parameters(), fused=True), stepping)
        losses = train(model, optimizer, range(2))
        with real_weights(model):
            for part in model.layers[1::2]:
                edit(part.up.weight)
        losses |= train(model, optimizer, range(2, 5))
        return everything(model, losses)

    side_by_side(script)


@STEPPING
def test_weights_loaded_between_steps(stepping: str) -> None:
    def script(model: nn.Module) -> Tensors:
        optimizer = stepped(model, torch.optim.AdamW(model.parameters()), stepping)
        losses = train(model, optimizer, range(2))
        with real_weights(model):
            model.load_state_dict(CASES["dropout"].build().state_dict())
        losses |= train(model, optimizer, range(2, 5))
        return everything(model, losses)

    side_by_side(script)


@STEPPING
def test_ema_of_diffusers(stepping: str) -> None:
    """Averages of the weights are taken after each step and swapped in for an evaluation: the
    swap, and the swap back, went unseen."""
    from diffusers.training_utils import EMAModel

    case = CASES["dropout"]

    def script(model: nn.Module) -> Tensors:
        optimizer = stepped(model, torch.optim.AdamW(model.parameters()), stepping)
        parameters = list(model.parameters())
        ema = EMAModel(parameters, decay=0.8)
        seen: Tensors = {}
        for index in range(5):
            seen |= train(model, optimizer, range(index, index + 1))
            with real_weights(model):
                ema.step(parameters)
            if index == 2:
                with real_weights(model):
                    ema.store(parameters)
                    ema.copy_to(parameters)
                model.eval()
                with torch.no_grad():
                    seen["evaluation"] = case.loss(model, case.inputs(9)).clone()
                model.train()
                with real_weights(model):
                    ema.restore(parameters)
        shadows = {f"shadow {i}": shadow.clone() for i, shadow in enumerate(ema.shadow_params)}
        return everything(model, seen | shadows)

    side_by_side(script)


def test_ema_needs_nothing_special_with_a_plain_optimizer() -> None:
    """Between passes, parameters are host tensors with their values."""
    from diffusers.training_utils import EMAModel

    def script(model: nn.Module) -> Tensors:
        optimizer = torch.optim.AdamW(model.parameters())
        ema = EMAModel(model.parameters(), decay=0.8)
        seen: Tensors = {}
        for index in range(4):
            seen |= train(model, optimizer, range(index, index + 1))
            ema.step(model.parameters())
        return seen | {f"shadow {i}": s.clone() for i, s in enumerate(ema.shadow_params)}

    side_by_side(script)


@STEPPING
def test_layers_that_thaw_one_after_another(stepping: str) -> None:
    """What trains changes while it trains; the optimizer gets a group more each time."""

    def build() -> nn.Module:
        model = CASES["dropout"].build().requires_grad_(False)
        model.head.requires_grad_(True)
        model.layers[5].requires_grad_(True)
        return model

    def script(model: nn.Module) -> Tensors:
        trains = [p for p in model.parameters() if p.requires_grad]
        optimizer = stepped(model, torch.optim.AdamW(trains), stepping)
        losses = train(model, optimizer, range(2))
        for index, layer in ((2, 3), (4, 0)):
            model.layers[layer].requires_grad_(True)
            optimizer.add_param_group({"params": list(model.layers[layer].parameters())})
            losses |= train(model, optimizer, range(index, index + 2))
        model.layers[5].requires_grad_(False)
        losses |= train(model, optimizer, range(6, 8))
        return everything(model, losses)

    side_by_side(script, build)


# ---- adapters -----------------------------------------------------------------------------------


def library_step(model: nn.Module, optimizer: Optimizer, index: int) -> torch.Tensor:
    case = CASES["gpt2"]
    loss = case.loss(model, case.inputs(index))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach().clone()


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    settings: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True, "init_lora_weights": False,
    }  # fmt: skip
    return LoraConfig(**settings | changes)


@pytest.mark.parametrize("trained_before", [False, True], ids=["at_once", "after_two_steps"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_lora_added_after_streaming_began(activations: str, *, trained_before: bool) -> None:
    """Adapters that came after the hooks were placed stayed on another device, or never trained."""

    def script(model: nn.Module) -> Tensors:
        seen: Tensors = {}
        if trained_before:
            optimizer = sgd(model)
            seen |= {f"full {i}": library_step(model, optimizer, i) for i in range(2)}
        model.add_adapter(lora(), adapter_name="first")
        trains = [p for p in model.parameters() if p.requires_grad]
        assert len(trains) == 16
        optimizer = torch.optim.AdamW(trains, lr=1e-3)
        seen |= {f"adapter {i}": library_step(model, optimizer, i) for i in range(2, 5)}
        return everything(model, seen)

    side_by_side(script, CASES["gpt2"].build, activations=activations)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_adapters_swapped_merged_and_taken_away() -> None:
    """A merge writes through `.data` of the base weights: a stale copy of them stayed in use."""
    from peft.tuners.lora import LoraLayer

    def script(model: nn.Module) -> Tensors:
        seen: Tensors = {}

        def steps(name: str, indices: range) -> None:
            optimizer = sgd(model)
            seen.update({f"{name} {i}": library_step(model, optimizer, i) for i in indices})

        model.add_adapter(lora(), adapter_name="first")
        model.add_adapter(lora(r=2), adapter_name="second")
        steps("second", range(2))
        model.set_adapter("first")
        steps("first", range(2, 4))
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        with real_weights(model):
            for layer in layers[::2]:
                layer.merge()
        steps("half merged", range(4, 6))
        with real_weights(model):
            for layer in layers[::2]:
                layer.unmerge()
        model.delete_adapter("second")
        steps("deleted", range(6, 8))
        return everything(model, seen)

    side_by_side(script, CASES["gpt2"].build)


def test_peft_around_a_streamed_model() -> None:
    from peft import get_peft_model

    def script(model: nn.Module) -> Tensors:
        adapted = get_peft_model(model, lora())
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
        seen: Tensors = {str(i): library_step(adapted, optimizer, i) for i in range(4)}
        library_loss = CASES["gpt2"].loss(adapted, CASES["gpt2"].inputs(5))
        library_loss.backward()
        return everything(model, seen) | gradients(model)

    side_by_side(script, CASES["gpt2"].build)


# ---- saving and resuming ------------------------------------------------------------------------


def checkpoint_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("resumed_by", ["streamed", "plain"])
@STEPPING
def test_resumed_in_the_middle(tmp_path: Path, stepping: str, resumed_by: str) -> None:
    """Losses after a resume are those of the run that was not interrupted, bit for bit; what a
    streamed run saved, a plain one can go on with."""
    case = CASES["dropout"]

    def started(how: str) -> tuple[nn.Module, Optimizer]:
        model = case.build()
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        if how == "streamed":
            model = stream_within(model, "50%")
            optimizer = stepped(model, optimizer, stepping)
        return model, optimizer

    torch.manual_seed(3)
    model, optimizer = started("streamed")
    train(model, optimizer, range(4))
    torch.save(checkpoint_of(model, optimizer), tmp_path / "checkpoint.pt")
    expected = everything(model, train(model, optimizer, range(4, 8)))

    torch.manual_seed(4)
    model, optimizer = started(resumed_by)
    loaded = torch.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    assert_same_tensors(
        "resumed", everything(model, train(model, optimizer, range(4, 8))), expected
    )

    torch.manual_seed(3)
    model, optimizer = started("plain")
    train(model, optimizer, range(4))
    assert_same_tensors("plain", everything(model, train(model, optimizer, range(4, 8))), expected)


@STEPPING
def test_saved_weights_are_those_of_the_last_step(tmp_path: Path, stepping: str) -> None:
    """`save_pretrained` and `state_dict` straight after `step()`, while updates may be pending."""
    from safetensors.torch import load_file

    case = CASES["llama"]
    saved = []
    for how in ("plain", "streamed"):
        model = case.build() if how == "plain" else stream_within(case.build(), "50%")
        torch.manual_seed(3)
        optimizer = stepped(model, torch.optim.AdamW(model.parameters()), stepping)
        for index in range(3):
            case.loss(model, case.inputs(index)).backward()
            optimizer.step()
            optimizer.zero_grad()
        copied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        case.loss(model, case.inputs(4)).backward()
        optimizer.step()
        model.save_pretrained(tmp_path / how)
        saved.append((copied, load_file(tmp_path / how / "model.safetensors")))
    for mine, theirs in zip(saved[1], saved[0], strict=True):
        assert_same_tensors("saved", mine, theirs)
