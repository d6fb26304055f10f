"""Files that a memory grows in: records behind records, mapped into memory, in a folder that knows how far it can be
trusted.

    state.safetensors          how many tokens count, and whatever else a cache holds; replaced in one move
    tokens-LAYER-ROW.bin       keys and values of each token [2, G, D], in the order of positions
    index-LAYER-ROW.bin        what ranks each whole block [G, 2 d]; far-... the same at a clamped distance

Pages are only appended to. What stands behind the tokens that the state counts is not there: a reader that was killed
goes on from its last state. Before a record that the state counts is written anew, the state is removed: what is left
of a killed writer is the last state or none, never another text's.
"""

import json
import math
import os
import re
from pathlib import Path

import torch


try:
    import fcntl
except ImportError:  # Windows: nobody watches over two writers there
    fcntl = None

STATE_NAME = "state.safetensors"
PAGE_FILE = re.compile(r"(tokens|index|far)-\d{3,}-\d{3,}\.bin")
ROOM_STEP = 256  # records


class PageFile:
    """`records` [room, *shape], mapped from a file.

    Args:
        count: records that it holds, for a file that is gone on with.
        is_bank: only read: what is written into `records` then never reaches the file.

    Raises:
        ValueError: a file of fewer records.
        OSError: no room is left on the disk, before anything is written.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, count: int = 0, is_bank: bool = False):
        self.path, self.shape, self.dtype, self.is_bank = path, shape, dtype, is_bank
        self.record_bytes = math.prod(shape) * dtype.itemsize
        held = path.stat().st_size // self.record_bytes if path.is_file() else 0
        if held < count:
            raise ValueError(f"{path.name} is cut off: it must hold {count} records, got {held}.")
        if not count and not is_bank:
            path.unlink(missing_ok=True)
        self.records = torch.empty(0, *shape, dtype=dtype)
        if count:
            self._map(count)

    def _map(self, room: int) -> None:
        size = room * math.prod(self.shape)
        mapped = torch.from_file(str(self.path), shared=not self.is_bank, size=size, dtype=self.dtype)
        self.records = mapped.view(room, *self.shape)

    def write(self, first: int, records: torch.Tensor) -> None:
        """Puts records [T, *shape] at `first`, ..., which must not lie behind the last one."""
        end = first + len(records)
        if end > len(self.records):
            room = -(-max(end, len(self.records) * 5 // 4) // ROOM_STEP) * ROOM_STEP
            with self.path.open("ab") as file:
                if hasattr(os, "posix_fallocate"):  # else a full disk would end the process when pages are written
                    os.posix_fallocate(file.fileno(), 0, room * self.record_bytes)
                else:
                    file.truncate(room * self.record_bytes)
            self._map(room)
        self.records[first:end] = records.to("cpu", self.dtype)

    def flush(self) -> None:
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def trim(self, count: int) -> None:
        """Gives back the room behind `count` records."""
        self.records = torch.empty(0, *self.shape, dtype=self.dtype)
        if self.path.is_file():
            os.truncate(self.path, count * self.record_bytes)
        if count:
            self._map(count)


class StoreFolder:
    """The folder of a memory on disk, for one writer or any number of readers.

    Raises:
        ValueError: a path that is no folder, that another process writes to, or, for a new one, that holds a state.
    """

    def __init__(self, path: str | Path, is_new: bool = False, is_bank: bool = False):
        self.path, self.is_bank, self.committed = Path(path).absolute(), is_bank, None
        self.is_closed = False
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`path` must be a folder, got the file {self.path}.")
        if is_new:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not self.state_path.is_file():
            raise FileNotFoundError(f"no saved memory in {self.path}: reading it never came to a first state.")
        self._lock = None
        self._take_lock()
        if is_new:
            if self.state_path.exists():
                raise ValueError(
                    f"`path`: {self.path} holds a memory already: load it (`load_cache`, `MemoryBank.open`), or delete "
                    "it first."
                )
            for left in self.path.iterdir():  # of a writer that was killed before its first state
                if PAGE_FILE.fullmatch(left.name):
                    left.unlink()

    @property
    def state_path(self) -> Path:
        return self.path / STATE_NAME

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, (fcntl.LOCK_SH if self.is_bank else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            what = "is being written to" if self.is_bank else "is in use"
            raise ValueError(f"`path`: the memory in {self.path} {what} by another cache.") from error

    def close(self) -> None:
        """Lets others write here, and lets nothing more be written by this one."""
        self.is_closed = True
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __deepcopy__(self, memo):
        if self.is_bank:  # read by any number of caches
            return self
        raise ValueError("`cache`: a cache on disk cannot be copied. Copy its folder, and load that.")

    def __reduce__(self):  # the lock is this process's own: another one takes it anew
        if self.is_bank:
            return type(self), (self.path, False, True)
        raise ValueError("`cache`: a cache on disk cannot be pickled. Save it, close it, and load its folder there.")

    def __del__(self):
        if getattr(self, "_lock", None) is not None:
            self.close()

    def file(self, name: str, layer: int, row: int, shape: tuple[int, ...], dtype, count: int = 0) -> PageFile:
        path = self.path / f"{name}-{layer:03d}-{row:03d}.bin"
        try:
            return PageFile(path, shape, dtype, count, self.is_bank)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def before_writing(self, first: int) -> None:
        """Removes the state if it counts record `first`, which is going to be written anew.

        Raises:
            ValueError: the folder is closed.
        """
        if self.is_closed:
            raise ValueError(f"`cache` was closed: load it from {self.path}.")
        if self.committed is not None and first < self.committed:
            self.state_path.unlink(missing_ok=True)
            self._sync()
            self.committed = None

    def commit(self, temporary: Path, tokens: int) -> None:
        """Makes a state that was written beside the old one the one that counts; the pages are flushed already.

        Args:
            tokens: below which none may be written anew as long as this state stands.
        """
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self.state_path)
        self._sync()
        self.committed = tokens

    def _sync(self) -> None:
        if self._lock is not None:
            os.fsync(self._lock)


def read_numbers(text: str, names: tuple[str, ...]) -> list[int]:
    """Counts out of a file that is not trusted: JSON of integers of at least 0 under these names.

    Raises:
        ValueError: anything else.
    """
    try:
        told = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is no JSON") from error
    values = [told.get(name) for name in names] if isinstance(told, dict) else [None]
    if any(isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < 2**40 for x in values):
        raise ValueError(f"wanted counts {', '.join(names)}, got {text!r}")
    return values
