import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Tiny networks are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
