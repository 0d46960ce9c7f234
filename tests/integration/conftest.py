import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request):
    """Handing a tiny matmul to several threads costs more than the matmul; real models keep them all."""
    if request.node.get_closest_marker("real_model"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
