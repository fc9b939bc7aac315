"""A zoo of tiny random models, one row each: what every bit-equality test runs over.

How a test uses it::

    for case in CASES:
        for call in case.calls:
            model = case.build()             # seeded, eval mode unless its name says train
            with torch.no_grad():
                outputs = call.run(model)    # seeds inside; a pytree
            flatten(outputs)                 # its tensors
"""

from __future__ import annotations

from . import diffusion, multimodal, odd_access, odd_order, odd_storage, plain, text, vision
from .case import Call, Inputs, ZooCase
from .compare import assert_bit_equal, flatten

CASES: tuple[ZooCase, ...] = (
    *text.CASES,
    *vision.CASES,
    *multimodal.CASES,
    *diffusion.CASES,
    *plain.CASES,
    *odd_access.CASES,
    *odd_storage.CASES,
    *odd_order.CASES,
)

CASE_CALLS: tuple[tuple[ZooCase, Call], ...] = tuple(
    (case, call) for case in CASES for call in case.calls
)
CASE_CALL_IDS: tuple[str, ...] = tuple(f"{case.name}-{call.name}" for case, call in CASE_CALLS)


def by_name(name: str) -> ZooCase:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


__all__ = [
    "CASES",
    "CASE_CALLS",
    "CASE_CALL_IDS",
    "Call",
    "Inputs",
    "ZooCase",
    "assert_bit_equal",
    "by_name",
    "flatten",
]
