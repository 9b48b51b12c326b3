"""A fixture that lets PyTorch use one thread."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread, since with small tensors on a busy machine more threads wait for each other.

    It applies to the folders whose conftest.py imports it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
