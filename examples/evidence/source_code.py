"""Bytes of Python's own standard library, which every machine has: files to train on, and files to test on."""

from pathlib import Path

import torch

from examples.texts import python_source_files


def source_files() -> list[Path]:
    """All modules without tests, in the order of a fixed shuffle, so that every part of the list is of every kind."""
    files = python_source_files()
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    return [files[i] for i in order]


def source_bytes(held_out: bool, every: int = 10) -> torch.Tensor:
    """The files of one side joined, uint8 [N]: every tenth is held out."""
    chosen = [path for i, path in enumerate(source_files()) if (i % every == 0) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in chosen)), dtype=torch.uint8)
