"""How models are cut: the parts by name, what is looked up by rows, what must reside."""

import pytest
import torch
from torch import nn

from superpipeline.blocks import cut
from superpipeline.build import lay_out
from zoo import by_name

CPU = torch.device("cpu")


def parts(name: str) -> list[str]:
    return [part.name for part in cut(by_name(name).build()).parts]


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{index}" for index in range(count)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [*numbered("model.layers", 5), "model.norm", "lm_head"]),
        ("chained_layers", None),
        ("nn_transformer", None),
    ],
)
def test_repeated_units_are_parts(name: str, expected: list[str] | None) -> None:
    found = parts(name)
    assert len(found) == len(set(found))
    assert expected is None or [part for part in found if "rotary" not in part] == expected


def test_experts_are_parts_of_their_own() -> None:
    """A layer with a list of like experts is cut further: those not chosen are not fetched."""
    assert any("experts.0" in part for part in parts("module_list_moe"))


def test_a_sequential_inside_a_unit_is_not_cut() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x)

    model = nn.Sequential(*[Unit() for _ in range(3)])
    assert [part.name for part in cut(model).parts] == ["0", "1", "2"]


def test_modules_without_forward_own_nothing() -> None:
    """Weights in a ParameterDict belong to the module whose forward reads them."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.ParameterDict({"a": nn.Parameter(torch.ones(4))})
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table["a"]

    model = Holder()
    (root, *layers) = cut(model).parts
    assert root.roots == [model]
    assert root.tensors == [id(model.table["a"])]
    assert [part.name for part in layers] == ["layers.0", "layers.1"]


def test_large_vocabularies_are_looked_up_by_rows() -> None:
    layout = lay_out(by_name("gpt2").build(), CPU, 1, ())
    assert {layout.weights[index].name for index in layout.rows} == {"transformer.wte.weight"}


def test_small_buffers_reside() -> None:
    model = by_name("resnet").build()
    layout = lay_out(model, CPU, 1, ())
    names = {layout.weights[index].name for index in layout.must_reside}
    assert {name for name, _ in model.named_buffers()} <= names


def test_small_neighbours_are_grouped() -> None:
    """A final norm alone is not worth a transfer."""
    layout = lay_out(by_name("llama").build(), CPU, 1, ())
    assert not any(block.name == "model.norm" for block in layout.blocks)


@pytest.mark.parametrize("k_prime", [1, 2, 3])
def test_k_prime_groups_consecutive_parts(k_prime: int) -> None:
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(7)])
    layout = lay_out(model, CPU, k_prime, ())
    assert [len(block.roots) for block in layout.blocks] == {
        1: [1] * 7,
        2: [2, 2, 2, 1],
        3: [3, 3, 1],
    }[k_prime]
