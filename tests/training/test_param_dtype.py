"""Mixed precision: the losses, masters and optimizer states of the plain loop with two models."""

import copy

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import BudgetError, InputError, UnsupportedError, gradients
from training.models import WIDTH, Stack
from training.reference import Row, assert_same, train_by_copy, train_streamed

# What the pairwise rows of test_training.py leave out.
ROWS = [
    Row("mlp", "adamw_fused", "accumulate", stepping="lazy", bound="20%"),
    Row("mlp", "sgd", "plain", bound="100%"),
    Row("seq2seq", "adamw", "checkpoint", stepping="lazy", bound="k2"),
    Row("unet", "adafactor", "scaler"),
    Row("twice", "adamw", "plain"),
    Row("two_passes", "adamw", "accumulate", stepping="lazy"),
    Row("weight_on_ctx", "adamw", "frozen_half"),
    Row("weight_views", "adamw", "accumulate"),
    Row("nested", "sgd", "clip"),
    Row("llama_tied", "adamw_fused", "accumulate", stepping="lazy", bound="20%"),
    Row("gpt2", "adamw", "lora", bound="k4"),
    Row("mixtral", "adamw", "clip", stepping="lazy"),
]


# The reference adds up in float32 after each micro-batch, and these have two backwards in one.
TWO_BACKWARDS = {"twice", "two_passes"}
PAIRS = [(row, None) for row in ROWS]
PAIRS += [(row, torch.float32) for row in ROWS if row.case not in TWO_BACKWARDS]


@pytest.mark.parametrize(("row", "grad_dtype"), PAIRS, ids=str)
def test_ten_steps_are_those_of_the_loop_with_two_models(row, grad_dtype):
    expected = train_by_copy(row, grad_dtype=grad_dtype)
    run = train_streamed(row, param_dtype=torch.bfloat16, grad_dtype=grad_dtype)
    assert_same(run, expected)
    assert row.bound == "100%" or min(run.streamed) > 0


@pytest.mark.parametrize("row", ROWS[::3], ids=str)
def test_gradients_that_leave_the_device_are_added_up_as_they_land(row, monkeypatch):
    """As on a GPU, where copies of gradients are on their way while others are computed."""
    expected = train_by_copy(row)
    monkeypatch.setattr(gradients, "leave", lambda _: True)
    run = train_streamed(row, param_dtype=torch.bfloat16)
    assert_same(run, expected)
    assert run.stats.gradient_bytes_peak > 0


# ---- what users see -----------------------------------------------------------------------------


def streamed():
    torch.manual_seed(0)
    model = Stack()
    superpipeline.stream(model, "50%", param_dtype=torch.bfloat16, device="cpu", quiet=True)
    return model


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters()}


def inputs():
    return torch.randn(2, 8, WIDTH, dtype=torch.bfloat16)


def test_half_the_bytes_are_streamed():
    plain = superpipeline.stream(Stack(), "50%", device="cpu", quiet=True)
    model = streamed()
    for each, x in ((plain, inputs().float()), (model, inputs())):
        with torch.no_grad():
            each(x)
    ours, theirs = (superpipeline.handle(each).plan for each in (model, plain))
    assert ours.weight_bytes == pytest.approx(theirs.weight_bytes / 2, rel=0.1)
    assert ours.device_bytes <= theirs.device_bytes * 0.55


@pytest.mark.parametrize("end", ["backward", "dropped", "no graph", "failed"])
def test_masters_show_between_passes(end):
    model = streamed()
    if end == "backward":
        model(inputs()).sum().backward()
    elif end == "dropped":
        model(inputs())
    elif end == "no graph":
        with torch.no_grad():
            model(inputs())
    else:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(inputs()[..., :3])
    assert dtypes(model) == {torch.float32}


def test_who_reads_weights_before_the_backward_sees_masters():
    """A step of any optimizer, weights(), a state dict; the backward comes all the same."""
    model = streamed()
    expected = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    loss = model(inputs()).sum()
    assert dtypes(model) == {torch.bfloat16}
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
    other = model(inputs()).sum()
    with superpipeline.handle(model).weights():
        assert dtypes(model) == {torch.float32}
    (loss + other).backward()
    last = model(inputs()).sum()
    optimizer.step()
    assert dtypes(model) == {torch.float32}
    del last
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_edits_of_masters_are_seen_in_whatever_form():
    model = streamed()
    x = inputs()

    def check():
        reference = copy.deepcopy(values).to(torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(model(x), reference(x))

    torch.manual_seed(0)
    values = Stack()
    check()
    for edit in (
        lambda p: p.add_(1e-2),
        lambda p: p.data.mul_(1.01),
        lambda p: setattr(p, "data", p.data * 0.99),
    ):
        with torch.no_grad():
            for each in (model, values):
                for parameter in each.parameters():
                    edit(parameter)
        check()
    values.load_state_dict(Stack().state_dict())
    model.load_state_dict(values.state_dict(), assign=True)
    check()


def test_hooks_see_whole_gradients_of_masters():
    model = streamed()
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p: seen.append((p.dtype, p.grad.dtype, p.grad.clone()))
        )
    model(inputs()).sum().backward()
    model(inputs()).sum().backward()
    count = len(list(model.parameters()))
    assert len(seen) == 2 * count
    assert all(entry[:2] == (torch.float32, torch.float32) for entry in seen)


def test_a_backward_that_fails_leaves_gradients_as_they_were():
    model = streamed()
    model(inputs()).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = model(inputs())
    loss.register_hook(lambda _: None)
    list(model.parameters())[2].register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name])
    assert dtypes(model) == {torch.float32}


def fail(_):
    raise ZeroDivisionError


def test_closing_gives_masters_back():
    model = streamed()
    model(inputs()).sum().backward()
    expected = copy.deepcopy(model.state_dict())
    superpipeline.handle(model).close()
    assert dtypes(model) == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
    model(inputs().float())


def test_a_set_up_that_fails_gives_masters_back():
    model = Stack()
    with pytest.raises(BudgetError):
        superpipeline.stream(model, 1000, param_dtype=torch.bfloat16, device="cpu")
    assert dtypes(model) == {torch.float32}
    model(inputs().float())


def test_another_precision_is_taken_up():
    model = streamed()
    superpipeline.stream(model, "40%", device="cpu", quiet=True)
    with torch.no_grad():
        assert model(inputs().float()).dtype is torch.float32


def test_a_forward_that_writes_a_weight_is_refused():
    class Writes(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(0.5)
            return super().forward(x)

    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)], Writes(64, 64))
    superpipeline.stream(model, "60%", param_dtype=torch.bfloat16, device="cpu", quiet=True)
    with pytest.raises(UnsupportedError, match=r"the forward writes 4\.weight in place"):
        model(torch.randn(2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"param_dtype": torch.int8}, "give a floating dtype"),
        ({"grad_dtype": torch.float32}, "has no meaning without param_dtype"),
    ],
)
def test_what_cannot_be_is_said(options, text):
    with pytest.raises(InputError, match=text):
        superpipeline.stream(Stack(), "50%", device="cpu", **options)


@pytest.mark.parametrize("bound", ["50%", "80%"])
def test_verify_with_masters(bound: str) -> None:
    """Its plain runs had masters in blocks that are resident, and copies in others."""
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
    superpipeline.stream(model, bound, param_dtype=torch.bfloat16, device="cpu", quiet=True)
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    for _ in range(2):
        assert superpipeline.handle(model).verify(x).equal
        model(x)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
