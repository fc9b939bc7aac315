"""Ten steps of the loop people have, on a plain and on a streamed model, compared bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

import superpipeline
from superpipeline import BudgetError
from training.cases import CASES, TrainCase
from training.recipes import (
    INFINITE_STEPS,
    OPTIMIZERS,
    RECIPES,
    Recipe,
    prepare,
    trained,
)

NUM_STEPS = 10
TRAIN_SEED = 11

BOUNDS: dict[str, dict[str, Any]] = {
    "20%": {"weights": "20%"},
    "50%": {"weights": "50%"},
    "k2": {"k": 2, "k_prime": 1},
    "k4": {"k": 4, "k_prime": 2},
}


class Row(NamedTuple):
    """One combination of choices; each is a name.

    Attributes:
        stepping: "plain", a torch optimizer on the model's parameters, or "lazy", the handle's.
        made: whether the torch optimizer is made "before" the model is streamed, or "after".
    """

    case: str
    optimizer: str
    recipe: str
    activations: str = "keep"
    stepping: str = "plain"
    bound: str = "50%"
    made: str = "after"

    def __str__(self) -> str:
        return "-".join(self)


Tensors = dict[str, torch.Tensor | None]


@dataclass
class Run:
    """What ten steps left behind, and what was seen on the way; all tensors are copies.

    Attributes:
        seen: of each step, what the work of each micro-batch returned: losses first.
        gradients: of each step, as the optimizer got them.
        rng: the state of the CPU's generator after each step.
        evaluation: the loss in eval mode without a graph, after the last step.
        states: of each optimizer, its `state_dict()`.
        streamed: bytes fetched in forwards and in backwards, of the steps after the third.
        stats: the handle's, at the end.
    """

    seen: list[list[torch.Tensor]] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    rng: list[torch.Tensor] = field(default_factory=list)
    evaluation: torch.Tensor | None = None
    weights: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    states: list[Any] = field(default_factory=list)
    streamed: tuple[int, int] = (0, 0)
    stats: Any = None


# ---- the loop -----------------------------------------------------------------------------------


@dataclass
class Step:
    """One micro-batch of one step, as `training.cases.Step` says."""

    index: int
    recipe: Recipe
    scaler: torch.amp.GradScaler

    def forward(self) -> AbstractContextManager[Any]:
        return self.recipe.forward()

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if self.recipe.scales and self.index in INFINITE_STEPS:
            loss = loss * float("inf")
        return self.scaler.scale(loss / self.recipe.micro_batches)


@dataclass
class Loop:
    """The user's loop. It knows nothing of streaming.

    Attributes:
        cast: what is done to inputs.
        after_backward, after_step: what a reference that keeps two models does there.
    """

    case: TrainCase
    recipe: Recipe
    model: nn.Module
    optimizers: list[Optimizer]
    cast: Callable[[Any], Any] = lambda inputs: inputs
    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None
    trained_by: nn.Module | None = None

    def __post_init__(self) -> None:
        self.run = Run()
        self.scaler = self.recipe.scaler()
        self.schedulers = self.recipe.schedulers(self.optimizers)
        self.names = [(n, p) for n, p in self.owner.named_parameters() if p.requires_grad]

    @property
    def owner(self) -> nn.Module:
        """The model whose parameters the optimizers step."""
        return self.trained_by or self.model

    def steps(self, num_steps: int = NUM_STEPS) -> Iterator[int]:
        """Trains, a step for each index that it gives."""
        for index in range(num_steps):
            self._accumulate(index)
            self._update()
            self.run.rng.append(torch.get_rng_state())
            yield index

    def _accumulate(self, index: int) -> None:
        step = Step(index, self.recipe, self.scaler)
        seen: list[torch.Tensor] = []
        for micro in range(self.recipe.micro_batches):
            inputs = self.cast(self.case.inputs(index * self.recipe.micro_batches + micro))
            seen += self.case.work(self.case, self.model, inputs, step)
            self.after_backward()
        self.run.seen.append([tensor.detach().clone() for tensor in seen])

    def _update(self) -> None:
        recipe, scaler = self.recipe, self.scaler
        for optimizer in self.optimizers if recipe.clip is not None else []:
            scaler.unscale_(optimizer)
        if recipe.clip is not None:
            norm = nn.utils.clip_grad_norm_([p for _, p in self.names], recipe.clip)
            self.run.seen[-1].append(norm.detach().clone())
        self.run.gradients.append({name: _copy(p.grad) for name, p in self.names})
        for optimizer in self.optimizers:
            scaler.step(optimizer)
        scaler.update()
        for scheduler in self.schedulers:
            scheduler.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not recipe.keeps_zeros)
        self.after_step()

    def evaluate(self) -> None:
        """One forward of another kind; with lazy optimizers, while updates are still pending."""
        self.model.eval()
        with torch.no_grad():
            self.run.evaluation = self.case.loss(self.model, self.cast(self.case.inputs(0))).clone()
        self.model.train()

    def read(self) -> Run:
        """Copies what training left behind."""
        self.run.weights = {name: _copy(p) for name, p in self.owner.named_parameters()}
        self.run.buffers = {name: _copy(b) for name, b in self.model.named_buffers()}
        self.run.states = [copy.deepcopy(opt.state_dict()) for opt in self.optimizers]
        return self.run


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


# ---- who runs it --------------------------------------------------------------------------------


def prepared(row: Row) -> tuple[TrainCase, Recipe, nn.Module]:
    """A fresh model, as it is before it is streamed, and the global generator seeded."""
    case, recipe = CASES[row.case], RECIPES[row.recipe]
    model = prepare(case.build(), recipe, case)
    case.attach(model)
    torch.manual_seed(TRAIN_SEED)
    return case, recipe, model


def train_plain(row: Row, num_steps: int = NUM_STEPS) -> Run:
    """The plain model's ten steps: what every streamed run must come to."""
    case, recipe, model = prepared(row)
    loop = Loop(case, recipe, model, OPTIMIZERS[row.optimizer](trained(model)))
    for _ in loop.steps(num_steps):
        pass
    loop.evaluate()
    return loop.read()


def train_streamed(row: Row, num_steps: int = NUM_STEPS, **options: Any) -> Run:
    """The same steps on the streamed model; asserts that `close` hands the same weights back."""
    case, recipe, model = prepared(row)
    cast = _caster(options.get("param_dtype"))
    optimizers = OPTIMIZERS[row.optimizer](trained(model)) if row.made == "before" else []
    model = stream_within(model, row.bound, activations=row.activations, **options)
    handle = superpipeline.handle(model)
    optimizers = optimizers or OPTIMIZERS[row.optimizer](trained(model))
    if row.stepping == "lazy":
        optimizers = [handle.optimizer(optimizer) for optimizer in optimizers]
    loop = Loop(case, recipe, model, optimizers, cast)
    before = streamed_bytes(handle)
    for index in loop.steps(num_steps):
        if index == 2:
            before = streamed_bytes(handle)
    after = streamed_bytes(handle)
    loop.evaluate()
    with handle.weights():
        run = loop.read()
    run.streamed = (after[0] - before[0], after[1] - before[1])
    run.stats = handle.stats()
    handle.close()
    assert_same_tensors("after close(), weight", weights_of(model), run.weights)
    return run


def stream_within(model: nn.Module, bound: str, **options: Any) -> nn.Module:
    """Streams with max(`bound`, the least that works)."""
    options = {"device": "cpu", "quiet": True} | options
    try:
        return superpipeline.stream(model, **BOUNDS.get(bound, {"weights": bound}), **options)
    except BudgetError as error:
        return superpipeline.stream(model, weights=error.least_bytes, **options)


def streamed_bytes(handle: Any) -> tuple[int, int]:
    """Bytes fetched so far in forwards and in backwards; `streamed_bytes` counts both."""
    stats = handle.stats()
    return stats.streamed_bytes - stats.backward_streamed_bytes, stats.backward_streamed_bytes


def weights_of(model: nn.Module) -> Tensors:
    return {name: _copy(parameter) for name, parameter in model.named_parameters()}


# ---- the reference of param_dtype ---------------------------------------------------------------


def train_by_copy(
    row: Row,
    *,
    param_dtype: torch.dtype | None = torch.bfloat16,
    grad_dtype: torch.dtype | None = None,
    num_steps: int = NUM_STEPS,
) -> Run:
    """The reference for `param_dtype`: a copy computes, fp32 masters are stepped.

    Gradients add up in the copy, as in any model, or after each micro-batch in `grad_dtype`. They
    reach the optimizer, and whoever clips them, in the masters' dtype.
    """
    case, recipe, masters = prepared(row)
    compute = copy.deepcopy(masters)
    for parameter in compute.parameters():
        parameter.data = parameter.data.to(param_dtype or parameter.dtype)
    pairs = list(zip(masters.parameters(), compute.parameters(), strict=True))

    def hand_over() -> None:
        for master, parameter in pairs:
            if parameter.grad is not None:
                _hand_over(master, parameter, grad_dtype)

    def refresh() -> None:
        for master, parameter in pairs:
            _refresh(master, parameter, grad_dtype)

    optimizers = OPTIMIZERS[row.optimizer](trained(masters))
    cast = _caster(param_dtype)
    loop = Loop(case, recipe, compute, optimizers, cast, hand_over, refresh, trained_by=masters)
    for _ in loop.steps(num_steps):
        pass
    loop.evaluate()
    return loop.read()


def _refresh(master: Any, parameter: Any, grad_dtype: torch.dtype | None) -> None:
    parameter.data.copy_(master.data)
    if grad_dtype is None:
        parameter.grad = None if master.grad is None else master.grad.to(parameter.dtype)


def _hand_over(master: Any, parameter: Any, grad_dtype: torch.dtype | None) -> None:
    if grad_dtype is None:
        master.grad = parameter.grad.to(master.dtype)
        return
    new, old = parameter.grad.to(grad_dtype), master.grad
    master.grad = (new if old is None else old.to(grad_dtype) + new).to(master.dtype)
    parameter.grad = None


def _caster(dtype: torch.dtype | None) -> Callable[[Any], Any]:
    """Floating-point inputs in the dtype that the model computes in, as its user gives them."""
    if dtype is None:
        return lambda inputs: inputs

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def cast_all(inputs: Any) -> Any:
        return type(inputs)(*torch.utils._pytree.tree_map_only(torch.Tensor, cast, tuple(inputs)))

    return cast_all


# ---- comparison ---------------------------------------------------------------------------------


def assert_same(actual: Run, expected: Run) -> None:
    """Every bit of two runs agrees; the first step that differs is named, with its tensors."""
    for step, pairs in enumerate(zip(actual.seen, expected.seen, strict=True)):
        mine, theirs = ({str(i): t for i, t in enumerate(run)} for run in pairs)
        assert_same_tensors(f"step {step}: loss, or what was returned,", mine, theirs)
        assert torch.equal(actual.rng[step], expected.rng[step]), f"step {step}: random state"
        assert_same_tensors(
            f"step {step}: gradient", actual.gradients[step], expected.gradients[step]
        )
    assert_same_tensors("weight", actual.weights, expected.weights)
    assert_same_tensors("buffer", actual.buffers, expected.buffers)
    for index, (mine, theirs) in enumerate(zip(actual.states, expected.states, strict=True)):
        assert_same_states(f"optimizer {index}", mine, theirs)
    assert_same_tensors("loss in eval mode", {"": actual.evaluation}, {"": expected.evaluation})


def assert_same_states(what: str, actual: Any, expected: Any) -> None:
    """Two optimizers' state_dicts: the same entries, hyperparameters and bits."""
    assert actual["param_groups"] == expected["param_groups"], f"{what}: param_groups"
    assert_same_tensors(
        f"{what}: state", _flat_state(actual["state"]), _flat_state(expected["state"])
    )


def _flat_state(state: dict[int, dict[str, Any]]) -> Tensors:
    return {
        f"{number}.{key}": torch.as_tensor(value)
        for number, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def assert_same_tensors(what: str, actual: Tensors, expected: Tensors) -> None:
    """The same names, and under each the same bits, or None."""
    assert actual.keys() == expected.keys(), f"{what}s: names {actual.keys() ^ expected.keys()}"
    wrong = {name: _difference(actual[name], expected[name]) for name in expected}
    wrong = {name: text for name, text in wrong.items() if text is not None}
    if wrong:
        first = next(iter(wrong))
        others = "" if len(wrong) == 1 else f"; {len(wrong)} differ: {', '.join(wrong)}"
        raise AssertionError(f"{what} {first}: {wrong[first]}{others}")


def _difference(actual: torch.Tensor | None, expected: torch.Tensor | None) -> str | None:
    if actual is None or expected is None:
        return None if actual is expected else f"{_kind(actual)}, expected {_kind(expected)}"
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return f"{_kind(actual)}, expected {_kind(expected)}"
    different = _bits(actual) != _bits(expected)
    if actual.is_floating_point():  # a NaN's bits depend on the order of operands: any is any
        different &= ~(actual.isnan() & expected.isnan()).flatten()
    if not different.any():
        return None
    first = int(different.nonzero()[0])
    pair = actual.flatten()[first].item(), expected.flatten()[first].item()
    return (
        f"{int(different.sum())} of {actual.numel()} elements differ in {_kind(expected)}, the "
        f"first at flat index {first}: {pair[0]!r}, expected {pair[1]!r}"
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().cpu().flatten().contiguous()
    return flat.view(integers[flat.itemsize])


def _kind(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{str(tensor.dtype)[6:]}{list(tensor.shape)}"
