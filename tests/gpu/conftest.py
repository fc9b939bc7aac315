"""These tests need a GPU: `make test-gpu`, or `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a GPU; leave them out with -m 'not gpu'")
    torch.cuda.empty_cache()
    return torch.device("cuda", torch.cuda.current_device())
