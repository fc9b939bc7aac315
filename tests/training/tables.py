"""The choices that training is tested with, which of them cannot go together, and the rows."""

from __future__ import annotations

from training.cases import CASES
from training.pairwise import Choice, Choices, Pair, impossible, rows
from training.recipes import OPTIMIZERS, RECIPES
from training.reference import BOUNDS, Row

ACTIVATIONS = ("keep", "recompute", "offload", "recompute+offload")

CHOICES: Choices = {
    "case": tuple(CASES),
    "optimizer": tuple(OPTIMIZERS),
    "recipe": tuple(RECIPES),
    "activations": ACTIVATIONS,
    "stepping": ("plain", "lazy"),
    "bound": tuple(BOUNDS),
    "made": ("after", "before"),
}


def why_not(one: Choice, other: Choice) -> str | None:
    """The reason why two choices cannot go together."""
    if one[0] == "case" and other[0] == "recipe":
        return CASES[one[1]].without.get(other[1])
    return None


EXCLUDED: dict[Pair, str] = impossible(CHOICES, why_not)
ROWS: tuple[Row, ...] = tuple(Row(**row) for row in rows(CHOICES, EXCLUDED))

# ---- a compute copy in bfloat16 -----------------------------------------------------------------

MIXED_CHOICES: Choices = {
    "case": ("mlp", "dropout", "recurrent", "experts", "revisited", "gpt2", "llama", "t5", "vit"),
    "optimizer": ("adamw", "adamw_fused", "muon"),
    "recipe": ("plain", "accumulate", "clip", "frozen_half", "checkpoint"),
    "activations": ACTIVATIONS,
    "stepping": ("plain", "lazy"),
    "bound": ("20%", "50%", "k2"),
    "made": ("after", "before"),
    "grad_dtype": ("None", "float32"),
}
MIXED_EXCLUDED: dict[Pair, str] = impossible(MIXED_CHOICES, why_not)
_MIXED = rows(MIXED_CHOICES, MIXED_EXCLUDED)
MIXED_ROWS: tuple[tuple[Row, str], ...] = tuple(
    (Row(**{name: value for name, value in row.items() if name != "grad_dtype"}), row["grad_dtype"])
    for row in _MIXED
)
