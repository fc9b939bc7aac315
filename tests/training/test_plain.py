"""The references are sound: they repeat themselves, they train, and they see a single bit.

No test here streams anything. What a streamed run relies on is also shown here, on plain models:
that a recompute is exact, and that an optimizer may step parameter by parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from training.cases import CASES
from training.recipes import INFINITE_STEPS, OPTIMIZERS, RECIPES, trained
from training.reference import (
    NUM_STEPS,
    TRAIN_SEED,
    Row,
    Run,
    assert_same,
    assert_same_tensors,
    prepared,
    train_by_copy,
    train_plain,
    weights_of,
)
from training.tables import MIXED_ROWS, ROWS

# What a plain run depends on; the other choices are about streaming.
PLAIN_ROWS = [Row(*key) for key in dict.fromkeys((r.case, r.optimizer, r.recipe) for r in ROWS)]
COPIED_ROWS = [
    (Row(*key), dtype)
    for *key, dtype in dict.fromkeys((r.case, r.optimizer, r.recipe, d) for r, d in MIXED_ROWS)
]


@pytest.mark.slow  # of the plain model: what is wrong here shows in the streamed rows as well
@pytest.mark.parametrize("row", PLAIN_ROWS, ids=lambda row: "-".join(row[:3]))
def test_ten_steps_twice(row: Row) -> None:
    first = train_plain(row)
    assert_same(train_plain(row), first)
    assert_it_trains(first, row)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "dtype"), COPIED_ROWS, ids=str)
def test_ten_steps_of_a_copy_twice(row: Row, dtype: str) -> None:
    options = {"grad_dtype": None if dtype == "None" else getattr(torch, dtype)}
    first = train_by_copy(row, **options)
    assert_same(train_by_copy(row, **options), first)
    assert_it_trains(first, row)


def assert_it_trains(run: Run, row: Row) -> None:
    """No NaN that could be taken for poison, and all weights that should move do."""
    recipe = RECIPES[row.recipe]
    finite = [bool(torch.stack([t.isfinite().all() for t in step]).all()) for step in run.seen]
    infinite = INFINITE_STEPS if recipe.scales and recipe.clip is not None else ()
    assert [step for step, good in enumerate(finite) if not good] == list(infinite)
    assert all(t is not None and t.isfinite().all() for t in run.weights.values())
    assert run.evaluation is not None and run.evaluation.isfinite()
    before = weights_of(prepared(row)[2])
    still = {name for name, weight in run.weights.items() if torch.equal(weight, before[name])}
    moved = {
        name
        for step in run.gradients
        for name, gradient in step.items()
        if gradient is not None and gradient.any() and gradient.isfinite().all()
    }
    assert moved, "nothing has a gradient"
    assert not moved & still, "a weight with a gradient has not moved"
    assert len(run.seen) == len(run.gradients) == NUM_STEPS


# ---- written out by hand ------------------------------------------------------------------------


def test_the_loop_is_the_one_people_write() -> None:
    """Accumulation over four micro-batches, momentum; not a word from the modules under test."""
    case = CASES["dropout"]
    model = case.build()
    torch.manual_seed(TRAIN_SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.01)
    losses, gradients = [], []
    for step in range(NUM_STEPS):
        for micro in range(4):
            loss = case.loss(model, case.inputs(4 * step + micro))
            (loss / 4).backward()
            losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    run = train_plain(Row("dropout", "sgd", "accumulate"))
    assert_same_tensors("weight", run.weights, dict(model.named_parameters()))
    for step in range(NUM_STEPS):
        assert_same_tensors("gradient", run.gradients[step], gradients[step])
    assert torch.equal(torch.stack(losses), torch.stack([t for s in run.seen for t in s]))


def test_scaled_and_clipped_as_people_write_it() -> None:
    case = CASES["mlp"]
    model = case.build()
    torch.manual_seed(TRAIN_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(NUM_STEPS):
        loss = case.loss(model, case.inputs(step))
        if step in INFINITE_STEPS:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    run = train_plain(Row("mlp", "adamw_fused", "scaler"))
    assert_same_tensors("weight", run.weights, dict(model.named_parameters()))
    steps = {entry["step"].item() for entry in run.states[0]["state"].values()}
    assert steps == {NUM_STEPS - len(INFINITE_STEPS)}, "infinite steps are left out"


def test_fp32_masters_as_people_write_it() -> None:
    """The reference for `param_dtype`, written out."""
    case = CASES["gpt2"]
    masters, compute = case.build(), case.build().to(torch.bfloat16)
    torch.manual_seed(TRAIN_SEED)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=2e-3, fused=True)
    losses = []
    for step in range(NUM_STEPS):
        for micro in range(4):
            loss = case.loss(compute, case.inputs(4 * step + micro))
            (loss / 4).backward()
            losses.append(loss.detach())
        for master, parameter in zip(masters.parameters(), compute.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        for master, parameter in zip(masters.parameters(), compute.parameters(), strict=True):
            parameter.data.copy_(master.data)
    run = train_by_copy(Row("gpt2", "adamw_fused", "accumulate"))
    assert_same_tensors("weight", run.weights, dict(masters.named_parameters()))
    assert torch.equal(torch.stack(losses), torch.stack([t for s in run.seen for t in s]))


@pytest.mark.parametrize("recipe", ["accumulate", "clip"])
@pytest.mark.parametrize("case", ["dropout", "experts", "t5"])
def test_a_copy_of_the_same_dtype_changes_nothing(case: str, recipe: str) -> None:
    row = Row(case, "adamw", recipe)
    assert_same(train_by_copy(row, param_dtype=None), train_plain(row))


def test_grad_dtype_decides_how_gradients_add_up() -> None:
    row = Row("mlp", "adamw", "accumulate")
    narrow, wide = (train_by_copy(row, grad_dtype=d).gradients[0] for d in (None, torch.float32))
    different = [name for name in narrow if not torch.equal(narrow[name], wide[name])]
    assert different
    assert all(torch.equal(g, g.bfloat16().float()) for g in narrow.values())


# ---- what streaming relies on -------------------------------------------------------------------


RECOMPUTED = [name for name, case in CASES.items() if "checkpoint" not in case.without]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_recompute_is_exact(name: str) -> None:
    """Activation checkpointing gives the bits, random state and buffers of doing without."""
    assert_same(train_plain(Row(name, "sgd", "checkpoint")), train_plain(Row(name, "sgd", "plain")))


@pytest.mark.parametrize(("name", "shares"), [("dropout", False), ("revisited", True)])
def test_autocasts_cache_decides_bits(name: str, *, shares: bool) -> None:
    """A weight that is used twice is cast once, and its two gradients add up in bfloat16 before
    they are cast back. With the cache switched off they add up in fp32: other bits. So a copy that
    is not to stay on the device cannot be avoided by switching the cache off."""
    case, found = CASES[name], []
    for cached in (True, False):
        model = case.build()
        torch.manual_seed(TRAIN_SEED)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            loss = case.loss(model, case.inputs(0))
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found)) is not shares


LISTED: dict[str, Callable[[list[nn.Parameter]], list[Optimizer]]] = OPTIMIZERS | {
    kind.__name__.lower(): lambda ps, kind=kind: [kind(ps, lr=1e-3)]
    for kind in (
        torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam,
        torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
        torch.optim.Rprop,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_a_step_may_be_taken_parameter_by_parameter(name: str) -> None:
    """One optimizer for each parameter does what one for all does, also for foreach and fused."""
    whole, parts = CASES["dropout"].build(), CASES["dropout"].build()
    together = LISTED[name](trained(whole))
    apart = [optimizer for p in trained(parts) for optimizer in LISTED[name]([p])]
    for step in range(3):
        for model, optimizers in ((whole, together), (parts, apart)):
            torch.manual_seed(step)
            case = CASES["dropout"]
            case.loss(model, case.inputs(step)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_same_tensors("weight", dict(parts.named_parameters()), dict(whole.named_parameters()))


# ---- the comparison sees what there is to see ---------------------------------------------------


def flip(tensor: torch.Tensor) -> None:
    """The last bit of the last element."""
    bits = tensor.view(-1).view(torch.uint8)
    bits[-tensor.itemsize] ^= 1


def _last_state(run: Run) -> dict[str, Any]:
    return run.states[-1]["state"][0]


CHANGES: dict[str, tuple[Callable[[Run], Any], str]] = {
    "loss": (lambda run: flip(run.seen[4][0]), "step 4: loss"),
    "gradient": (
        lambda run: flip(run.gradients[7]["head.weight"]), "step 7: gradient head.weight",
    ),
    "no_gradient": (lambda run: run.gradients[2].update({"stem.bias": None}), "stem.bias: None"),
    "random_state": (lambda run: flip(run.rng[3]), "step 3: random state"),
    "weight": (
        lambda run: flip(run.weights["layers.2.up.weight"]), r"weight layers\.2\.up\.weight: 1 of",
    ),
    "name": (lambda run: run.weights.pop("stem.bias"), "names"),
    "zero": (lambda run: run.weights["stem.bias"].data[0].fill_(-0.0), r"-0\.0, expected 0\.0"),
    "evaluation": (lambda run: flip(run.evaluation), "eval"),
    "state": (lambda run: flip(_last_state(run)["exp_avg"]), r"optimizer 0: state 0\.exp_avg"),
    "missing_state": (lambda run: _last_state(run).pop("exp_avg_sq"), "names"),
    "learning_rate": (
        lambda run: run.states[0]["param_groups"][0].update(lr=1.0), "param_groups",
    ),
    "dtype": (
        lambda run: run.weights.update({"stem.bias": run.weights["stem.bias"].double()}),
        r"float64\[128\], expected float32\[128\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_single_bit_is_seen(what: str) -> None:
    change, message = CHANGES[what]
    run = train_plain(Row("dropout", "adamw", "plain"))
    run.weights["stem.bias"].data[0] = 0.0
    other = copy.deepcopy(run)
    assert_same(other, run)
    change(other)
    with pytest.raises(AssertionError, match=message):
        assert_same(other, run)


def test_a_buffers_bit_is_seen() -> None:
    run = train_plain(Row("resnet", "sgd", "plain"), num_steps=1)
    other = copy.deepcopy(run)
    name = next(name for name in other.buffers if name.endswith("running_var"))
    flip(other.buffers[name])
    with pytest.raises(AssertionError, match=f"buffer {name}"):
        assert_same(other, run)
