"""Starts the ranks of Transformers' distributed tests; laid out as `tests/distributed_testing_utils.py`.

The mixins of 5.24 import five functions from that file, which no source distribution has. These are ours: they do what
the mixins need of them, under the names that are imported.
"""

import os
import socket

import torch
import torch.distributed as dist
from transformers.testing_utils import torch_device


BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "npu": "hccl"}


def _get_distributed_device_type() -> str:
    return torch.device(torch_device).type


def _get_distributed_backend() -> str:
    return BACKENDS[_get_distributed_device_type()]


def _get_rank_device(rank: int) -> torch.device:
    kind = _get_distributed_device_type()
    return torch.device(kind) if kind == "cpu" else torch.device(kind, rank)


def _set_rank_device(rank: int) -> None:
    if _get_distributed_device_type() != "cpu":
        torch.accelerator.set_device_index(rank)


def _start_rank_processes(function, args: tuple, nprocs: int) -> None:
    """Calls `function(rank, *args)` in a process of its own for each rank; raises what the first failed one raised."""
    torch.multiprocessing.spawn(function, args=args, nprocs=nprocs)


def _run_rank(rank: int, function, world_size: int, port: int, args: tuple, kwargs: dict) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    _set_rank_device(rank)
    dist.init_process_group(_get_distributed_backend(), rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """Decorator: a call of `function(rank, ...)` runs it on `world_size` ranks, inside a process group."""

    def decorate(function):
        def run(*args, **kwargs):
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            _start_rank_processes(_run_rank, (function, world_size, port, args, kwargs), world_size)

        return run

    return decorate
