"""For all tests: uninitialised memory is NaN, seeds are fixed, nothing asks the network."""

import functools
import os
import random


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import torch._dynamo
from torch.utils._device import _device_constructors


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be said before anything imports Triton
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def _poisoned(allocate):
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned


@pytest.fixture(scope="session", autouse=True)
def poison_uninitialised_memory():
    """A buffer that is read before it is written then shows in the result, whatever the allocator left there."""
    _device_constructors()  # remembers the functions that `with torch.device(...)` redirects: the real ones
    with torch.device("cpu"):
        torch.empty(0)  # makes `torch.device` contexts note the real functions, which the poisoned ones call
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)), raising=False)
        yield


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Graphs that another test has compiled count towards the compiler's limits."""
    torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device; without one they are skipped, and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
