"""Fixtures that several test files use."""

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """The folder of a tiny chat model."""
    from model_folder import make_folder  # transformers takes seconds to import

    return str(make_folder(tmp_path_factory.mktemp("tiny"), chat=True))
