"""Training on CUDA: gradients arrive on the host, and steps there are bit by bit the plain model's.

The reference computes forward and backward on the device with the plain model, copies gradients to
the host, and steps a host copy with the same optimizer.
"""

import copy
from collections.abc import Iterator

import pytest
import torch

import superpipeline
from superpipeline import build
from training.cases import CASES
from training.recipes import RECIPES, prepare

STEPS = 4


@pytest.fixture(autouse=True)
def small_weights_train_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LEAST_TRAINED_ON_HOST", 0)
    monkeypatch.setattr(build, "LEAST_TRANSFER", {"cuda": 0, "cpu": 0})


def to_device(inputs, device):
    return type(inputs)(
        *torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), tuple(inputs))
    )


class Host:
    """The plain model on the device, and its parameters' truth on the host."""

    def __init__(self, model, device):
        self.masters = copy.deepcopy(model)
        self.model = model.to(device)
        self.pairs = list(zip(self.masters.parameters(), self.model.parameters(), strict=True))

    def take_gradients(self):
        for master, parameter in self.pairs:
            if parameter.grad is not None:
                new = parameter.grad.cpu()
                master.grad = new if master.grad is None else master.grad.add_(new)
                parameter.grad = None

    def beside(self, model):
        """Each parameter's name, `model`'s, and the master."""
        names = model.named_parameters()
        for (key, mine), other in zip(names, self.masters.parameters(), strict=True):
            yield key, mine, other

    def refresh(self):
        for master, parameter in self.pairs:
            parameter.data.copy_(master.data)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Some backwards (of an expand, an index) add up in any order, in the plain model too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def can_be(name: str, recipe: str) -> bool:
    # Losses on attributes keep their graphs, so the plan stays as it was before anything trained:
    # some weights still reside, and step on the device, whose rounding the reference has not.
    if (name, recipe) == ("attribute_loss", "checkpoint"):
        return False
    return recipe not in CASES[name].without


ROWS = [
    (name, recipe)
    for name in CASES
    for recipe in ("plain", "accumulate", "checkpoint")
    if can_be(name, recipe)
]


@pytest.mark.parametrize("bound", ["30%", "60%"])
@pytest.mark.parametrize(("name", "recipe"), ROWS)
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single")
def test_steps_are_the_plain_models(name, recipe, bound, device):
    case, recipe = CASES[name], RECIPES[recipe]
    torch.backends.cuda.matmul.allow_tf32 = False
    plain = Host(prepare(case.build(), recipe, case), device)
    model = prepare(case.build(), recipe, case)
    try:
        superpipeline.stream(model, bound, device=device, quiet=True)
    except superpipeline.BudgetError as error:
        superpipeline.stream(model, error.least_bytes + 2**16, device=device, quiet=True)
    theirs = torch.optim.AdamW(plain.masters.parameters(), lr=1e-3)
    for step in range(STEPS):
        accumulate(case, recipe, model, plain, step, device)
        expect_gradients(model, plain, step)
        if step == 0:  # from here on parameters are where they train
            ours = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        plain.refresh()
    for key, mine, other in plain.beside(model):
        assert mine.device.type != "cpu" or torch.equal(mine, other), key
    stats = superpipeline.handle(model).stats()
    assert stats.streamed_bytes > stats.backward_streamed_bytes > 0
    superpipeline.handle(model).close()


def accumulate(case, recipe, model, plain, step, device):
    """One step's micro-batches, on both; the losses are the same."""
    for micro in range(recipe.micro_batches):
        inputs = to_device(case.inputs(step * recipe.micro_batches + micro), device)
        losses = []
        for each in (model, plain.model):
            torch.manual_seed(step)
            loss = case.loss(each, inputs)
            loss.backward()
            losses.append(loss.detach())
        plain.take_gradients()
        assert torch.equal(*losses), f"step {step}: loss"


def expect_gradients(model, plain, step):
    for key, mine, other in plain.beside(model):
        assert (mine.grad is None) == (other.grad is None), key
        if mine.grad is not None and step:
            assert mine.grad.device == mine.device, key
            assert torch.equal(mine.grad.cpu(), other.grad), f"step {step}: gradient of {key}"


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("activations", ["keep", "recompute", "offload", "recompute+offload"])
@pytest.mark.parametrize("name", ["llama", "resnet", "t5"])
def test_gradients_add_up_while_small_weights_become_resident(
    name, activations, device, monkeypatch
):
    """After the first backward norms and biases move to the device, and what they have of a
    gradient with them."""
    monkeypatch.setattr(build, "LEAST_TRAINED_ON_HOST", 2**11)
    case, recipe = CASES[name], RECIPES["accumulate"]
    plain = Host(prepare(case.build(), recipe, case), device)
    model = prepare(case.build(), recipe, case)
    superpipeline.stream(model, "70%", device=device, quiet=True, activations=activations)
    accumulate(case, recipe, model, plain, 0, device)
    expect_gradients(model, plain, 1)
    assert len({parameter.device for parameter in model.parameters()}) == 2
    superpipeline.handle(model).close()
    expect_gradients(model, plain, 1)
