"""Bytes of Python's own standard library, which every machine has: files to train on, and files to test on."""

import sysconfig
from pathlib import Path

import torch


LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def source_files() -> list[Path]:
    """All modules without tests, in the order of a fixed shuffle, so that every part of the list is of every kind."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    return [files[i] for i in order]


def source_bytes(held_out: bool, every: int = 10) -> torch.Tensor:
    """The files of one side joined, uint8 [N]: every tenth is held out."""
    chosen = [path for i, path in enumerate(source_files()) if (i % every == 0) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in chosen)), dtype=torch.uint8)
