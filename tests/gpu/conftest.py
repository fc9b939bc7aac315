"""These tests need a GPU: `make test-gpu`, or `pytest -m gpu`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# cuBLAS reads this when it starts. Without it, and without cudnn.deterministic below, the plain
# model of some tests differs from itself from run to run, and nothing can be compared with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a GPU; leave them out with -m 'not gpu'")
    torch.cuda.empty_cache()
    torch.backends.cudnn.deterministic = True
    yield torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.deterministic = False
