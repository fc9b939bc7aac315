"""Models of plain torch modules: recurrent, nn.Transformer, and experts called on demand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .case import VOCAB, Inputs, ZooCase, args_only, case, passes_call
from .layers import WIDTH, Layer, hidden_input, layer_list, token_input


class RecurrentLM(nn.Module):
    """Embedding, a stacked nn.LSTM (one module, which lists its parameters), a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=4, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        hidden, state = self.lstm(self.embed(ids))
        return self.head(hidden), state


class RecurrentStack(nn.Module):
    """One GRU or LSTM cell stack a layer: the recurrent modules are themselves the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True) for _ in range(5)
        )
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        state: tuple[torch.Tensor, torch.Tensor] | None = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return state[0]


class Seq2Seq(nn.Module):
    """nn.Transformer, batch first: in eval under no_grad its encoder takes the fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCAB, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 4, 5, 128, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], ids.device)
        hidden = self.transformer(
            self.source(ids), self.source(target), tgt_mask=mask, tgt_is_causal=True
        )
        logits: torch.Tensor = self.head(hidden)
        return logits


class MoELayer(nn.Module):
    """Top-2 routing over a ModuleList: an expert that no token chose is not called at all."""

    def __init__(self, num_experts: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, num_experts)
        self.experts = nn.ModuleList(Layer(hidden=64) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, dim=-1)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            if len(rows) > 0:
                output.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return x + output.view_as(x)


class MixtureOfExperts(nn.Module):
    """Four layers of six experts each; two tokens reach at most four experts a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoELayer() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TinyUNet(nn.Module):
    """A hand-written encoder and decoder with skips: outputs wait long before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 40, 40, 3, 2, 1) for i in range(3))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(40, 40, 4, 2, 1) for _ in range(3))
        self.out = nn.Conv2d(40, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for down in self.downs:
            x = functional.silu(down(x))
            skips.append(x)
        for up in self.ups:
            x = functional.silu(up(x + skips.pop()))
        image: torch.Tensor = self.out(x)
        return image


def _residual_stack() -> nn.Module:
    """Seven equal layers: an odd count, which wraps around onto the same place."""
    return nn.Sequential(*layer_list(7))


def _two_tokens() -> Inputs:
    return args_only(torch.randn(1, 2, WIDTH))


def _source_and_target() -> Inputs:
    return args_only(token_input().args[0], token_input().args[0][:, :5])


def _picture() -> Inputs:
    return args_only(torch.randn(2, 3, 16, 16))


CASES: tuple[ZooCase, ...] = (
    case("residual_stack", _residual_stack, hidden_input, passes_call(hidden_input)),
    case("lstm_lm", RecurrentLM, token_input),
    case("recurrent_stack", RecurrentStack, hidden_input),
    case("nn_transformer", Seq2Seq, _source_and_target),
    case("nn_transformer_train", Seq2Seq, _source_and_target, train=True),
    case("module_list_moe", MixtureOfExperts, _two_tokens),
    case("tiny_unet", TinyUNet, _picture),
)
