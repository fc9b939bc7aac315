"""Hand-written models, each with one difficulty for a backward, all too large for half a bound.

A layer's weights take 258 KiB, so each is a transfer of its own; a model's main layers are called
through `Stack.call`, which checkpoints them when a recipe asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zoo.layers import Layer

WIDTH = 128
HIDDEN = 256
NUM_CLASSES = 16
VOCAB = 256


def layer() -> Layer:
    return Layer(WIDTH, HIDDEN)


class Stack(nn.Module):
    """A stem, layers in a row, a head.

    Attributes:
        checkpointing: None, or `use_reentrant` of the activation checkpointing of each layer.
    """

    checkpointing: bool | None = None

    def __init__(self, layers: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layers or [layer() for _ in range(6)])
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def call(self, part: nn.Module, *args: Any) -> Any:
        """`part(*args)`, checkpointed if that is asked for."""
        if self.checkpointing is None or not torch.is_grad_enabled():
            return part(*args)
        return checkpoint(part, *args, use_reentrant=self.checkpointing)

    def body(self, x: torch.Tensor) -> Any:
        for part in self.layers:
            x = self.call(part, x)
        return x

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(self.stem(x)))


class MLP(Stack):
    """Linear and ReLU, the odd number of layers that wraps around onto one place."""

    def __init__(self) -> None:
        super().__init__([nn.Linear(HIDDEN, HIDDEN) for _ in range(7)])
        self.stem = nn.Linear(WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, NUM_CLASSES)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.layers:
            x = functional.relu(self.call(part, x))
        return x


class Dropped(Layer):
    """A layer with dropout inside, where only a recompute with the same random state repeats it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.dropout(functional.gelu(self.up(self.norm(x))), 0.1, self.training)
        return x + functional.dropout(self.down(hidden), 0.1, self.training)


class Dropout(Stack):
    """Dropout in every layer."""

    def __init__(self) -> None:
        super().__init__([Dropped(WIDTH, HIDDEN) for _ in range(6)])


class Recurrent(Stack):
    """LSTMs and GRUs, which list their parameters, as blocks; their outputs are tuples."""

    def __init__(self) -> None:
        kinds = (nn.LSTM, nn.GRU, nn.LSTM, nn.GRU, nn.LSTM)
        super().__init__([kind(WIDTH, WIDTH, batch_first=True) for kind in kinds])

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.layers:
            x = x + self.call(part, x)[0]
        return x


class MoELayer(nn.Module):
    """Top-2 routing; an expert that no token chose is not called, and gets no gradient."""

    def __init__(self, num_experts: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, num_experts)
        self.experts = nn.ModuleList(Layer(WIDTH, WIDTH) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, dim=-1)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            if len(rows) > 0:
                output = output.index_add(
                    0, rows, expert(tokens[rows]) * weights[rows, slots, None]
                )
        return x + output.view_as(x)


class MixtureOfExperts(Stack):
    """Layers of experts; each step calls others, and some none."""

    def __init__(self) -> None:
        super().__init__([MoELayer() for _ in range(3)])


class Seq2Seq(nn.Module):
    """nn.Transformer with dropout: the decoder's layers read the encoder's output."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCAB, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 3, 3, HIDDEN, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], ids.device)
        hidden = self.transformer(
            self.source(ids), self.source(target), tgt_mask=mask, tgt_is_causal=True
        )
        logits: torch.Tensor = self.head(hidden)
        return logits


class UNet(Stack):
    """Convolutions with skips: outputs wait long before they are used, in both directions."""

    channels = 64

    def __init__(self) -> None:
        nn.Module.__init__(self)
        wide = self.channels
        self.stem = nn.Conv2d(3, wide, 3, 1, 1)
        self.downs = nn.ModuleList(nn.Conv2d(wide, wide, 3, 2, 1) for _ in range(3))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(wide, wide, 4, 2, 1) for _ in range(3))
        self.head = nn.Conv2d(wide, 3, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for down in self.downs:
            x = functional.silu(self.call(down, x))
            skips.append(x)
        for up in self.ups:
            x = functional.silu(self.call(up, x + skips.pop()))
        return x


class Revisited(Stack):
    """Layers are visited several times in a pass, one twice in a row, one never."""

    order = (0, 1, 2, 1, 2, 2, 3, 0, 4)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            x = self.call(self.layers[index], x)
        return x


class Detached(Stack):
    """A stopped gradient in the middle; an auxiliary loss trains what lies below it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        below, above = list(self.layers[:3]), list(self.layers[3:])
        for part in below:
            x = self.call(part, x)
        auxiliary = x.square().mean()
        x = self.stem(x.detach())  # the stem has a gradient from either side
        for part in above:
            x = self.call(part, x)
        return self.head(x), auxiliary


class Keeping(Layer):
    """Keeps a loss on an attribute: it leaves by another door than the output."""

    kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.norm(x))
        self.kept = hidden.square().mean()
        return x + self.down(functional.gelu(hidden))


class AttributeLoss(Stack):
    """Every layer keeps a loss on an attribute."""

    def __init__(self) -> None:
        super().__init__([Keeping(WIDTH, HIDDEN) for _ in range(6)])


@dataclass
class State:
    """What DataclassLayer takes and returns; no container that PyTorch looks into."""

    hidden: torch.Tensor
    history: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    label: str = "start"


class DataclassLayer(Layer):
    """A layer from State to State."""

    def forward(self, state: State) -> Any:  # type: ignore[override]
        hidden = super().forward(state.hidden)
        means = [*state.history.get("means", []), hidden.mean(dim=-1)]
        return replace(state, hidden=hidden, history={"means": means}, label="layer")


class DataclassOutputs(Stack):
    """A dataclass goes in and out of every block, with tensors deep inside that a loss uses."""

    def __init__(self) -> None:
        super().__init__([DataclassLayer(WIDTH, HIDDEN) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> State:
        state: State = self.body(State(self.stem(x)))
        return replace(state, hidden=self.head(state.hidden))


class Unused(Stack):
    """A layer that is never called, and a parameter that no forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Parameter(torch.ones(WIDTH, HIDDEN))
        self.spare = layer()


class InPlace(Stack):
    """A block's output is changed in place before the next block sees it."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.layers:
            x = self.call(part, x)
            x.mul_(0.9).add_(0.01)
            x[:, 0] += 0.1
        return x


class Tokens(nn.Module):
    """Returns views of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.table = nn.Parameter(torch.randn(512, WIDTH))

    def forward(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cls.expand(batch, -1, -1), self.table[:length]


class WeightViews(Stack):
    """A block's output is a view of its weight, used after other blocks have run."""

    def __init__(self) -> None:
        super().__init__()
        self.token = Tokens()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cls, positions = self.token(x.shape[0], x.shape[1])
        x = self.body(self.stem(x))
        logits: torch.Tensor = self.head(torch.cat([cls, x + positions], dim=1))
        return logits


class AskedToFailError(Exception):
    """What a Failing layer raises."""


class Failing(Dropped):
    """Raises in the middle of its forward when `fails` is set."""

    fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            self.up(self.norm(x))
            raise AskedToFailError
        return super().forward(x)


class FailingForward(Stack):
    """One layer raises when it is told to."""

    def __init__(self) -> None:
        super().__init__([Failing(WIDTH, HIDDEN) for _ in range(6)])


class Link(nn.Module):
    """Runs a layer, then the rest of the chain, then uses its own weights again."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.layer = layer()
        self.rest = rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.rest(self.layer(x)) + self.layer.norm(x)
        return output


class Nested(nn.Module):
    """Each layer calls the next from inside itself, so visits nest five deep."""

    def __init__(self) -> None:
        super().__init__()
        chain: nn.Module = nn.Identity()
        for _ in range(5):
            chain = Link(chain)
        self.chain = chain
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.chain(x))
        return logits


class StrayReads(Stack):
    """The root reads weights of blocks, two of them in one node; the head is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        del self.stem, self.head
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.pos = nn.Parameter(torch.randn(1, 256, WIDTH) * 0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.body(self.embed(ids) + self.pos[:, : ids.shape[1]])
        both = self.layers[4].down.weight @ self.layers[1].up.weight
        return functional.linear(x + 0.1 * (x @ both), self.embed.weight)


class ScaledByWeight(torch.autograd.Function):
    """Keeps a view of its weight on ctx as an attribute, out of sight of saved-tensor hooks."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight.t()
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        (x,) = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = x.flatten(0, -2).t() @ grad.flatten(0, -2)
        return grad @ ctx.weight, of_weight


class ContextLayer(nn.Module):
    """A residual layer whose matmul is ScaledByWeight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.inner = layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ScaledByWeight.apply(x, self.weight)
        return x + torch.tanh(self.inner(y))


class WeightOnContext(Stack):
    """A custom autograd.Function stashes its weight on ctx, as 4-bit matmuls do."""

    def __init__(self) -> None:
        super().__init__([ContextLayer() for _ in range(5)])
