"""Mixed precision on CUDA: masters on the host, bf16 copies streamed, bit by bit the plain loop."""

import copy

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import build
from training.cases import CASES

STEPS = 4
ROWS = [
    (name, bound, lazy)
    for name in ("mlp", "dropout", "llama_tied", "gpt2", "mixtral", "weight_on_ctx", "vit")
    for bound, lazy in (("30%", False), ("60%", True), ("100%", True))
]


@pytest.fixture(autouse=True)
def small_weights_train_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LEAST_TRAINED_ON_HOST", 0)
    monkeypatch.setattr(build, "LEAST_TRANSFER", {"cuda": 0, "cpu": 0})


class TwoModels:
    """The plain loop: a bf16 model computes on the device, fp32 masters are stepped on the host."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.masters = model
        self.model = copy.deepcopy(model).to(device)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        self.pairs = list(zip(model.parameters(), self.model.parameters(), strict=True))

    def hand_over(self) -> None:
        for master, parameter in self.pairs:
            master.grad = None if parameter.grad is None else parameter.grad.cpu().float()

    def refresh(self) -> None:
        for master, parameter in self.pairs:
            parameter.data.copy_(master.data)
            parameter.grad = None


def losses(case, model, device, step):
    """Of two micro-batches."""
    for micro in range(2):
        inputs = case.inputs(2 * step + micro)
        inputs = type(inputs)(
            *torch.utils._pytree.tree_map_only(
                torch.Tensor,
                lambda t: t.to(device, torch.bfloat16 if t.is_floating_point() else t.dtype),
                tuple(inputs),
            )
        )
        torch.manual_seed(step)
        loss = case.loss(model, inputs)
        loss.backward()
        yield loss.detach()


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(("name", "bound", "lazy"), ROWS)
def test_steps_are_those_of_the_loop_with_two_models(name, bound, lazy, device):
    case = CASES[name]
    torch.use_deterministic_algorithms(True, warn_only=True)
    plain, model = TwoModels(case.build(), device), case.build()
    options = {"param_dtype": torch.bfloat16, "device": device, "quiet": True}
    try:
        superpipeline.stream(model, bound, **options)
    except superpipeline.BudgetError as error:
        superpipeline.stream(model, error.least_bytes + 2**16, **options)
    pipe = superpipeline.handle(model)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ours = pipe.optimizer(ours) if lazy else ours
    theirs = torch.optim.AdamW(plain.masters.parameters(), lr=1e-3)
    for step in range(STEPS):
        for mine, other in zip(
            losses(case, model, device, step), losses(case, plain.model, device, step), strict=True
        ):
            assert torch.equal(mine, other), f"step {step}: loss"
        plain.hand_over()
        for (key, a), (_, b) in zip(
            model.named_parameters(), plain.masters.named_parameters(), strict=True
        ):
            assert a.dtype is torch.float32, key
            assert a.device.type == "cpu", key
            assert (a.grad is None) == (b.grad is None), key
            assert a.grad is None or torch.equal(a.grad, b.grad), f"step {step}: gradient of {key}"
        ours.step()
        ours.zero_grad()
        theirs.step()
        theirs.zero_grad()
        plain.refresh()
    with pipe.weights():
        for (key, a), (_, b) in zip(
            model.named_parameters(), plain.masters.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), key
    torch.use_deterministic_algorithms(False)
    pipe.close()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
