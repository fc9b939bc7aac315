"""Fixtures that several test files use, and what all tests take for granted."""

import signal

import pytest

# A shell starts what it puts in the background with Ctrl-C ignored, and tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """The folder of a tiny chat model."""
    from model_folder import make_folder  # transformers takes seconds to import

    return str(make_folder(tmp_path_factory.mktemp("tiny"), chat=True))
