"""The table of what is trained: a model, its inputs, and how one step turns them into gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from training import library, models
from training.models import VOCAB, WIDTH
from zoo.case import BUILD_SEED, Inputs, args_only, scatter_weights, seeded


class Step(Protocol):
    """What a recipe gives to a case's work."""

    index: int

    def forward(self) -> Any:
        """The context that a forward runs in."""

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as its gradients are to be taken: scaled, and shared among micro-batches."""


Loss = Callable[[nn.Module, Inputs], torch.Tensor]
Work = Callable[["TrainCase", nn.Module, Inputs, Step], list[torch.Tensor]]


def ordinary(case: TrainCase, model: nn.Module, inputs: Inputs, step: Step) -> list[torch.Tensor]:
    """One forward, one loss, one backward."""
    with step.forward():
        loss = case.loss(model, inputs)
    step.scaled(loss).backward()
    return [loss]


@dataclass(frozen=True)
class TrainCase:
    """One row of the table.

    Attributes:
        factory: the model; `build` seeds it and puts it in training mode.
        make_inputs: random inputs; `inputs` seeds them.
        loss: of one forward.
        work: forward, backward and whatever else a step does; returns what it saw.
        attach: hooks and the like, attached before the model is streamed.
        lora: which modules adapters go to (PEFT's `target_modules`), or None.
        without: recipes that cannot be, with the reason.
    """

    name: str
    factory: Callable[[], nn.Module]
    make_inputs: Callable[[], Inputs]
    loss: Loss
    work: Work = ordinary
    attach: Callable[[nn.Module], None] = lambda _: None
    lora: Any = ("up", "down")
    without: dict[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The same weights every time; the caller's random state is left as it was."""

        def make() -> nn.Module:
            model = self.factory()
            scatter_weights(model)
            return model.train()

        return seeded(make, BUILD_SEED)()

    def inputs(self, index: int) -> Inputs:
        """The inputs of the micro-batch `index`, the same every time."""
        return seeded(self.make_inputs, 1000 + index)()


# ---- losses -------------------------------------------------------------------------------------


def outputs_loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Cross entropy against classes that the input decides."""
    return cross_entropy(model(*inputs.args), inputs)


def cross_entropy(logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    logits = logits.float().flatten(0, -2)
    return functional.cross_entropy(
        logits, torch.arange(len(logits), device=logits.device) % logits.shape[-1]
    )


def picture_loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return (model(*inputs.args).float() - inputs.args[0]).square().mean()


def library_loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model(**inputs.kwargs).loss


def auxiliary_loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    logits, auxiliary = model(*inputs.args)
    return cross_entropy(logits, inputs) + 0.1 * auxiliary


def attribute_loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    main = outputs_loss(model, inputs)
    return main + 0.1 * sum(part.kept for part in model.layers)


def state_loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    state = model(*inputs.args)
    means = torch.stack([mean.float().square().mean() for mean in state.history["means"]])
    return cross_entropy(state.hidden, inputs) + means.sum()


# ---- work ---------------------------------------------------------------------------------------


def asks_for_gradients(
    case: TrainCase, model: nn.Module, inputs: Inputs, step: Step
) -> list[torch.Tensor]:
    """torch.autograd.grad of some weights and of the input, then a backward of the same graph."""
    x = inputs.args[0].clone().requires_grad_()
    with step.forward():
        loss = case.loss(model, Inputs((x,), {}))
    watched = [p for p in model.parameters() if p.requires_grad][::3]
    found = torch.autograd.grad(step.scaled(loss), [x, *watched], retain_graph=True)
    step.scaled(loss).backward()
    return [loss, *found, x.grad]


def only_asks_for_gradients(
    case: TrainCase, model: nn.Module, inputs: Inputs, step: Step
) -> list[torch.Tensor]:
    """No backward at all: the gradients of torch.autograd.grad are put in place by hand."""
    with step.forward():
        loss = case.loss(model, inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(step.scaled(loss), trained)
    for parameter, gradient in zip(trained, found, strict=True):
        here = gradient.to(parameter.device)
        parameter.grad = here if parameter.grad is None else parameter.grad + here
    return [loss, *found]


def goes_back_twice(
    case: TrainCase, model: nn.Module, inputs: Inputs, step: Step
) -> list[torch.Tensor]:
    """The same graph twice: gradients add up."""
    with step.forward():
        loss = case.loss(model, inputs)
    step.scaled(loss).backward(retain_graph=True)
    step.scaled(loss * 0.5).backward()
    return [loss]


def two_losses(case: TrainCase, model: nn.Module, inputs: Inputs, step: Step) -> list[torch.Tensor]:
    """Two losses of one forward, one backward after the other."""
    with step.forward():
        logits, auxiliary = model(*inputs.args)
        main = cross_entropy(logits, inputs)
    step.scaled(auxiliary).backward(retain_graph=True)
    step.scaled(main).backward()
    return [main, auxiliary]


def two_passes(case: TrainCase, model: nn.Module, inputs: Inputs, step: Step) -> list[torch.Tensor]:
    """Two forwards before the first backward, and a third whose graph is never used."""
    with step.forward():
        first = case.loss(model, inputs)
        second = case.loss(model, Inputs((inputs.args[0].flip(0) * 0.5,), {}))
        unused = case.loss(model, inputs)
    step.scaled(first).backward()
    step.scaled(second).backward()
    return [first, second, unused]


def siamese(case: TrainCase, model: nn.Module, inputs: Inputs, step: Step) -> list[torch.Tensor]:
    """One backward through two forwards."""
    x = inputs.args[0]
    with step.forward():
        distance = (model(x) - model(x.flip(1))).float().square().mean()
    step.scaled(distance).backward()
    return [distance]


def survives_failures(
    case: TrainCase, model: nn.Module, inputs: Inputs, step: Step
) -> list[torch.Tensor]:
    """Every third step, a forward raises midway; then the step is done after all."""
    if step.index % 3 == 1:
        model.layers[3].fails = True
        try:
            case.loss(model, inputs)
        except models.AskedToFailError:
            model.layers[3].fails = False
    return ordinary(case, model, inputs, step)


def attach_hooks(model: nn.Module) -> None:
    """Hooks of all kinds, which change gradients; `model.calls` counts what ran."""
    model.calls = calls = Counter()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if not parameter.requires_grad:
            continue

        def halve(gradient: torch.Tensor, key: str = f"tensor {name}") -> torch.Tensor:
            calls[key] += 1
            return gradient * 0.5

        def double(owner: torch.Tensor, key: str = f"accumulated {name}") -> None:
            calls[key] += 1
            owner.grad.mul_(1.5)

        if number % 3 == 0:
            parameter.register_hook(halve)
        if number % 3 == 1:
            parameter.register_post_accumulate_grad_hook(double)

    def clamp(module: nn.Module, inwards: Any, outwards: Any) -> Any:
        calls["module"] += 1
        return tuple(None if g is None else g.clamp(-1e-3, 1e-3) for g in inwards)

    model.layers[3].register_full_backward_hook(clamp)


def counted(case: TrainCase, model: nn.Module, inputs: Inputs, step: Step) -> list[torch.Tensor]:
    """As usual; also returns how often each hook has run, and the gradient of the stem's output."""
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            kept.append(output)

    watching = model.stem.register_forward_hook(keep)
    try:
        losses = ordinary(case, model, inputs, step)
    finally:
        watching.remove()
    counts = [model.calls[key] for key in sorted(model.calls)]
    return [*losses, torch.tensor(counts), *(output.grad for output in kept)]


# ---- inputs -------------------------------------------------------------------------------------


def hidden() -> Inputs:
    return args_only(torch.randn(2, 8, WIDTH))


def ids() -> Inputs:
    return args_only(torch.randint(0, VOCAB, (2, 8)))


def source_and_target() -> Inputs:
    return args_only(torch.randint(0, VOCAB, (2, 8)), torch.randint(0, VOCAB, (2, 5)))


def picture() -> Inputs:
    return args_only(torch.randn(2, 3, 16, 16))


# ---- the table ----------------------------------------------------------------------------------

NO_LIST = dict.fromkeys(
    ("checkpoint", "checkpoint_reentrant"),
    "there is no list of layers that a user could checkpoint one by one",
)
NO_GRAPH_INSIDE = "a reentrant checkpoint runs the block without a graph: {} has no gradient"
NO_SUCH_CALL = "PyTorch refuses torch.autograd.grad through a reentrant checkpoint"
NOT_TENSORS = NO_GRAPH_INSIDE.format("what lies inside a dataclass")


def _by_hand(name: str, factory: Callable[[], nn.Module], **options: Any) -> TrainCase:
    settings: dict[str, Any] = {"make_inputs": hidden, "loss": outputs_loss} | options
    reentrant = settings.pop("not_reentrant", None)
    without: dict[str, str] = settings.pop("without", {})
    if reentrant is not None:
        without = without | {"checkpoint_reentrant": reentrant}
    return TrainCase(name, factory, without=without, **settings)


HAND_WRITTEN = (
    _by_hand("mlp", models.MLP, lora=r"layers\.\d"),
    _by_hand("dropout", models.Dropout),
    _by_hand("recurrent", models.Recurrent, without={"lora": "PEFT adapts no LSTM"}),
    _by_hand("experts", models.MixtureOfExperts),
    _by_hand(
        "seq2seq", models.Seq2Seq, make_inputs=source_and_target, lora=("linear1", "linear2"),
        without=NO_LIST,
    ),
    _by_hand("unet", models.UNet, make_inputs=picture, loss=picture_loss, lora=r"downs\.\d"),
    _by_hand("revisited", models.Revisited),
    _by_hand("detached", models.Detached, loss=auxiliary_loss),
    _by_hand(
        "attribute_loss", models.AttributeLoss, loss=attribute_loss,
        not_reentrant=NO_GRAPH_INSIDE.format("an attribute"),
    ),
    _by_hand("dataclass", models.DataclassOutputs, loss=state_loss, not_reentrant=NOT_TENSORS),
    _by_hand("unused", models.Unused),
    _by_hand("asks", models.Stack, work=asks_for_gradients, not_reentrant=NO_SUCH_CALL),
    _by_hand("only_asks", models.Stack, work=only_asks_for_gradients, not_reentrant=NO_SUCH_CALL),
    _by_hand("twice", models.Stack, work=goes_back_twice),
    _by_hand("two_losses", models.Detached, loss=auxiliary_loss, work=two_losses),
    _by_hand("two_passes", models.Dropout, work=two_passes),
    _by_hand("siamese", models.Dropout, work=siamese),
    _by_hand("in_place", models.InPlace),
    _by_hand("hooks", models.Stack, work=counted, attach=attach_hooks),
    _by_hand("weight_views", models.WeightViews),
    _by_hand("failing_forward", models.FailingForward, work=survives_failures),
    _by_hand("nested", models.Nested, without=NO_LIST),
    _by_hand("stray_reads", models.StrayReads, make_inputs=ids),
    _by_hand("weight_on_ctx", models.WeightOnContext),
)  # fmt: skip

NO_CHECKPOINTING = dict.fromkeys(
    ("checkpoint", "checkpoint_reentrant"), "this class of transformers knows no checkpointing"
)

FROM_LIBRARY = (
    TrainCase("gpt2", library.gpt2, library.sentence, library_loss, lora=("c_attn", "c_fc")),
    TrainCase(
        "llama", library.llama, library.sentence_with_cache, library_loss,
        lora=("q_proj", "up_proj"),
    ),
    TrainCase("llama_tied", library.llama_tied, library.sentence, library_loss, lora=("v_proj",)),
    TrainCase("mixtral", library.mixtral, library.sentence, library_loss, lora=("q_proj",)),
    TrainCase("t5", library.t5, library.translation, library_loss, lora=("q", "wo")),
    TrainCase(
        "albert", library.albert, library.masked, library_loss, lora=("query", "ffn"),
        without=NO_CHECKPOINTING,
    ),
    TrainCase("vit", library.vit, library.photo, library_loss, lora=("q_proj", "v_proj")),
    TrainCase("llava", library.llava, library.captioned, library_loss, lora=("q_proj", "up_proj")),
    TrainCase(
        "resnet", library.resnet, library.photo, library_loss, lora=("convolution",),
        without=NO_CHECKPOINTING,
    ),
)  # fmt: skip

CASES: dict[str, TrainCase] = {case.name: case for case in (*HAND_WRITTEN, *FROM_LIBRARY)}
