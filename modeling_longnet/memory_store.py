"""Where a layer with a memory keeps what it has read: on the device, in the CPU's memory, or in files.

All stores give the same numbers; they differ in what may stand where. Whoever attends takes keys and values in place
where it can (`whole`), and else fetches what was chosen, block by block: then the device holds the window, the index,
and what the queries of a stretch read.

Letters: B batch, G key/value heads, N tokens, T new tokens, n blocks of b tokens, m of them that are wanted, D head
dimension, d dimensions ranked in.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .memory_pages import ROOM_STEP, PageFile, StoreFolder


STORES = ("device", "cpu", "disk")
INDICES = ("index", "far")
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What all tokens of a layer have in common. size: b. device: where queries come from. indexed: how many
    heads have ranked blocks, g; None for all."""

    batch: int
    groups: int
    width: int
    dtype: torch.dtype
    device: torch.device
    size: int
    indexed: int | None = None


def _gather(x: torch.Tensor, tokens: torch.Tensor, heads: Sequence[int] | None) -> torch.Tensor:
    """Rows `tokens` [B, g, ...] of these heads' x [B, G, N, D]: [B, g, ..., D]."""
    batch, groups, room, _ = x.shape
    first = torch.arange(batch * groups, device=x.device).view(batch, groups)
    first = first if heads is None else first[:, list(heads)]
    first = first.view(*tokens.shape[:2], *[1] * (tokens.dim() - 2)) * room
    return x.flatten(0, 2).index_select(0, (tokens.to(x.device) + first).flatten()).unflatten(0, tokens.shape)


def whole_blocks(x: torch.Tensor, row: int, group: int, size: int) -> torch.Tensor:
    """The whole blocks [n, b, D] of one row and head of x [B, G, N, D]: a view."""
    return x[row, group, : x.shape[2] // size * size].unflatten(0, (-1, size))


class TensorStore:
    """Keys and values [B, G, room, D], on the device or in the CPU's memory, which is pinned if the device is a GPU.
    The index of the blocks [B, g, room / b, 2 d] lies on the device. All of it has room for up to a quarter more.

    Tokens that no query will read may be forgotten: `forgotten`, how many are, from position `sinks` on.
    """

    is_joint = True  # all rows lie in the same tensors

    def __init__(self, shape: Shape, on_device: bool):
        self.shape, self.on_device = shape, on_device
        self.sinks = self.forgotten = 0
        self.indices: dict[str, torch.Tensor] = {}
        self.keys, self.values = self._empty(0), self._empty(0)

    def _empty(self, room: int) -> torch.Tensor:
        s = self.shape
        device = s.device if self.on_device else torch.device("cpu")
        return torch.zeros(s.batch, s.groups, room, s.width, dtype=s.dtype, device=device, pin_memory=self._pins)

    @property
    def _pins(self) -> bool:
        return not self.on_device and self.shape.device.type == "cuda"

    def _place_tensor(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.keys.device)
        return x.pin_memory() if self._pins else x

    def write(self, row: slice, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps tokens [b, G, T, D] of these rows, from position `first` on."""
        first = self._place(first)
        end, held = first + key.shape[2], self.keys.shape[2]
        if end > held:
            room = -(-max(end, held * 5 // 4) // ROOM_STEP) * ROOM_STEP
            for name in ("keys", "values"):
                grown = self._empty(room)
                grown[:, :, :held] = getattr(self, name)
                setattr(self, name, grown)
        self.keys[row, :, first:end] = key
        self.values[row, :, first:end] = value

    def _place(self, position: int) -> int:
        """Where a position's token lies.

        Raises:
            ValueError: it was forgotten.
        """
        if position < self.sinks or not self.forgotten:
            return position
        if position < self.sinks + self.forgotten:
            raise ValueError(
                f"`cache` has forgotten the tokens {self.sinks} to {self.sinks + self.forgotten - 1}, which no query "
                f"reads any more, and was asked for {position}."
            )
        return position - self.forgotten

    def forget(self, sinks: int, end: int) -> None:
        """Lets go of the tokens `sinks`, ..., end - 1 of all rows."""
        kept = self._place(end)
        for name in ("keys", "values"):
            x = getattr(self, name)
            setattr(self, name, self._place_tensor(torch.cat([x[:, :, :sinks], x[:, :, kept:]], dim=2)))
        self.sinks, self.forgotten = sinks, end - sinks

    def write_index(self, name: str, row: slice, first: int, new: torch.Tensor) -> None:
        """Keeps what ranks blocks `first`, ... [b, g, n, 2 d]."""
        index, room = self.indices.get(name), self.keys.shape[2] // self.shape.size
        if index is None:
            index = new.new_zeros(self.shape.batch, new.shape[1], room, new.shape[-1])
        elif index.shape[2] < room:
            index = torch.nn.functional.pad(index, (0, 0, 0, room - index.shape[2]))
        index[row, :, first : first + new.shape[2]] = new
        self.indices[name] = index

    def ranked(self, name: str, row: slice) -> tuple[torch.Tensor, ...]:
        """The index of these rows' blocks, in parts that follow each other."""
        return (self.indices[name][row],) if name in self.indices else ()

    def whole(self, row: slice, end: int) -> Pair | None:
        """Keys and values of the first `end` tokens, [b, G, end, D], where they are on the device already."""
        if self.keys.device != self.shape.device or self.forgotten:
            return None
        return self.keys[row, :, :end], self.values[row, :, :end]

    def span(self, row: slice, begin: int, end: int) -> Pair:
        """Keys and values of some tokens on the device, [b, G, end - begin, D]."""
        if begin < self.sinks < end:
            self._place(self.sinks)  # refuses what was forgotten between them
        places = slice(self._place(begin), self._place(end - 1) + 1) if begin < end else slice(0)
        return tuple(x[row, :, places].to(self.shape.device) for x in (self.keys, self.values))

    def gather(self, tokens: torch.Tensor, heads: Sequence[int] | None = None) -> Pair:
        """Of single tokens [B, g, ...] of all rows and g of the heads, None for all, on the device: [B, g, ..., D]."""
        if self.forgotten:
            tokens = torch.where(tokens < self.sinks, tokens, (tokens - self.forgotten).clamp(min=0))
        return tuple(_gather(x, tokens, heads).to(self.shape.device) for x in (self.keys, self.values))

    def blocks(self, row: int, group: int, numbers: torch.Tensor) -> Pair:
        """Of whole blocks [m] of one row and head, on the device: [m, b, D]."""
        for_all = (whole_blocks(x, row, group, self.shape.size) for x in (self.keys, self.values))
        return tuple(x.index_select(0, numbers.to(x.device)).to(self.shape.device) for x in for_all)

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.restore({name: function(x) for name, x in self.stored().items()})

    def stored(self) -> dict[str, torch.Tensor]:
        stored = {"keys": self.keys, "values": self.values, **self.indices}
        if self.forgotten:
            gone = torch.tensor([self.sinks, self.forgotten], device=self.keys.device)
            stored["forgotten"] = gone.expand(len(self.keys), -1)
        return stored

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.keys, self.values = self._place_tensor(tensors["keys"]), self._place_tensor(tensors["values"])
        gone = tensors.get("forgotten", torch.zeros(1, 2)).long().unique(dim=0)
        if gone.shape != (1, 2) or int(gone.min()) < 0:
            raise ValueError(f"tells impossible numbers of forgotten tokens, {gone.tolist()}")
        self.sinks, self.forgotten = gone[0].tolist()
        self.indices = {name: tensors[name].to(self.shape.device) for name in INDICES if name in tensors}
        self.shape = replace(self.shape, batch=len(self.keys))

    def reset(self) -> None:
        self.keys, self.values, self.indices = self.keys[:, :, :0], self.values[:, :, :0], {}
        self.sinks = self.forgotten = 0

    def bytes(self) -> dict[str, int]:
        """By where they lie."""
        index = sum(x.nbytes for x in self.indices.values())
        tokens = self.keys.nbytes + self.values.nbytes
        return {"device": index + tokens} if self.on_device else {"device": index, "cpu": tokens}


class RowFiles:
    """One row's pages on disk: `tokens`, records [2, G, D], and an index [g, 2 d] for each name, made when it comes."""

    def __init__(
        self, folder: StoreFolder, layer: int, row: int, shape: Shape, count: int = 0, widths: dict | None = None
    ):
        self.folder, self.layer, self.row, self.shape = folder, layer, row, shape
        self.count = count  # tokens
        self.tokens = folder.file("tokens", layer, row, (2, shape.groups, shape.width), shape.dtype, count)
        self.indices = {name: self._index(name, width, count // shape.size) for name, width in (widths or {}).items()}
        # On a device that cannot read files: of all records there is room for.
        self.copies: dict[str, torch.Tensor] | None = None if shape.device.type == "cpu" else {}

    def __deepcopy__(self, memo):
        return copy.copy(self) if copy.deepcopy(self.folder, memo) is self.folder else None

    def _index(self, name: str, width: int, count: int = 0) -> PageFile:
        dtype, heads = torch.promote_types(self.shape.dtype, torch.float32), self.shape.indexed
        heads = self.shape.groups if heads is None else heads
        return self.folder.file(name, self.layer, self.row, (heads, width), dtype, count)

    def write(self, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Tokens [G, T, D]."""
        self.folder.before_writing(first)
        self.tokens.write(first, torch.stack([key, value]).permute(2, 0, 1, 3))
        self.count = first + key.shape[1]

    def write_index(self, name: str, first: int, new: torch.Tensor) -> None:
        if name not in self.indices:
            self.indices[name] = self._index(name, new.shape[-1])
        self.indices[name].write(first, new.transpose(0, 1))
        if self.copies is None:
            return
        copied, room = self._copy(name), len(self.indices[name].records)
        if copied.shape[2] < room:
            self.copies[name] = copied = torch.nn.functional.pad(copied, (0, 0, 0, room - copied.shape[2]))
        copied[0, :, first : first + new.shape[1]] = new

    def _copy(self, name: str) -> torch.Tensor:
        if name not in self.copies:
            self.copies[name] = self.indices[name].records.transpose(0, 1)[None].to(self.shape.device)
        return self.copies[name]

    def ranked(self, name: str) -> tuple[torch.Tensor, ...]:
        if name not in self.indices:
            return ()
        return (self.indices[name].records.transpose(0, 1)[None] if self.copies is None else self._copy(name),)

    def span(self, begin: int, end: int) -> Pair:
        records = self.tokens.records[begin:end].permute(1, 2, 0, 3).contiguous().to(self.shape.device)
        return records[:1], records[1:]

    def gather(self, tokens: torch.Tensor, heads: Sequence[int] | None = None) -> Pair:
        """Of tokens [g, ...] of g of the heads: [g, ..., D]."""
        groups, flat = self.shape.groups, self.tokens.records.flatten(0, 2)
        head = torch.arange(groups) if heads is None else torch.tensor(heads)
        head = head.view(-1, *[1] * (tokens.dim() - 1))
        first = tokens.cpu() * 2 * groups + head
        rows = torch.stack([first, first + groups]).flatten()
        return tuple(flat.index_select(0, rows).unflatten(0, (2, *tokens.shape)).to(self.shape.device))

    def blocks(self, group: int, numbers: torch.Tensor) -> Pair:
        size = self.shape.size
        records = self.tokens.records
        by_block = records[: len(records) // size * size].unflatten(0, (-1, size))
        numbers = numbers.to(records.device)
        return tuple(by_block[:, :, i, group].index_select(0, numbers).to(self.shape.device) for i in (0, 1))


class FileStore:
    """A file of tokens and of each index per row, in a folder."""

    def __init__(self, shape: Shape, rows: list[RowFiles]):
        self.shape, self.rows = shape, rows

    @property
    def is_joint(self) -> bool:
        return len(self.rows) == 1

    def _of(self, row: slice) -> list[RowFiles]:
        return self.rows[row]

    def write(self, row: slice, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for files, k, v in zip(self._of(row), key, value):
            files.write(first, k, v)

    def write_index(self, name: str, row: slice, first: int, new: torch.Tensor) -> None:
        for files, x in zip(self._of(row), new):
            files.write_index(name, first, x)

    def ranked(self, name: str, row: slice) -> tuple[torch.Tensor, ...]:
        (files,) = self._of(row)
        return files.ranked(name)

    def whole(self, row: slice, end: int) -> None:
        return None

    def span(self, row: slice, begin: int, end: int) -> Pair:
        pairs = [files.span(begin, end) for files in self._of(row)]
        return tuple(torch.cat(x) for x in zip(*pairs))

    def gather(self, tokens: torch.Tensor, heads: Sequence[int] | None = None) -> Pair:
        pairs = [files.gather(x, heads) for files, x in zip(self.rows, tokens)]
        return tuple(torch.stack(x) for x in zip(*pairs))

    def blocks(self, row: int, group: int, numbers: torch.Tensor) -> Pair:
        return self.rows[row].blocks(group, numbers)

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        order = function(torch.arange(len(self.rows))).tolist()
        if len(set(order)) < len(order):
            raise ValueError(
                f"`cache`: rows on disk cannot be doubled, as beam search does, got rows {order}: use store='cpu' or "
                "'device', behind a bank if the text is to stay on disk."
            )
        self.rows = [self.rows[i] for i in order]

    def stored(self) -> dict[str, torch.Tensor]:
        return {}

    def reset(self) -> None:
        for files in self.rows:
            files.folder.before_writing(0)
            files.count = 0

    def flush(self) -> None:
        for files in self.rows:
            for file in (files.tokens, *files.indices.values()):
                file.flush()

    def bytes(self) -> dict[str, int]:
        files = [file for row in self.rows for file in (row.tokens, *row.indices.values())]
        held = {"disk": sum(len(file.records) * file.record_bytes for file in files)}
        copies = sum(x.nbytes for row in self.rows for x in (row.copies or {}).values())
        return held | ({"device": copies} if copies else {})


class BankedStore:
    """Rows that begin with what a bank holds, read-only, and go on in a store of their own.

    Args:
        bases: of each row, its part of a bank, or None. own: keeps what comes behind the whole blocks of that part.
    """

    def __init__(self, bases: list[RowFiles | None], own: "TensorStore | FileStore"):
        self.bases, self.own, self.shape = bases, own, own.shape
        self.begins = [0 if base is None else base.count // self.shape.size * self.shape.size for base in bases]

    @property
    def is_joint(self) -> bool:
        return self.own.is_joint and all(base is self.bases[0] for base in self.bases)

    def _one(self, row: slice) -> tuple[RowFiles | None, int]:
        """The part of a bank that these rows share, and where their own text begins."""
        bases, begins = self.bases[row], self.begins[row]
        assert all(base is bases[0] for base in bases)
        return bases[0], begins[0]

    def write(self, row: slice, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.own.write(row, first - self._one(row)[1], key, value)

    def write_index(self, name: str, row: slice, first: int, new: torch.Tensor) -> None:
        self.own.write_index(name, row, first - self._one(row)[1] // self.shape.size, new)

    def ranked(self, name: str, row: slice) -> tuple[torch.Tensor, ...]:
        base, begin = self._one(row)
        parts = (
            () if base is None or not begin else tuple(x[:, :, : begin // self.shape.size] for x in base.ranked(name))
        )
        return parts + self.own.ranked(name, row)

    def whole(self, row: slice, end: int) -> None:
        return None

    def span(self, row: slice, begin: int, end: int) -> Pair:
        base, own = self._one(row)
        if begin >= own:
            return self.own.span(row, begin - own, end - own)
        rows = len(self.bases[row])
        pair = tuple(x.expand(rows, -1, -1, -1) for x in base.span(begin, min(end, own)))
        if end <= own:
            return pair
        return tuple(torch.cat(x, dim=2) for x in zip(pair, self.own.span(row, 0, end - own)))

    def gather(self, tokens: torch.Tensor, heads: Sequence[int] | None = None) -> Pair:
        begins = torch.tensor(self.begins, device=tokens.device).view(-1, *[1] * (tokens.dim() - 1))
        own = self.own.gather((tokens - begins).clamp(min=0), heads)
        pairs = []
        for base, begin, own_tokens, wanted in zip(self.bases, self.begins, zip(*own), tokens):
            if base is None or not begin:
                pairs.append(own_tokens)
                continue
            inside = (wanted < begin)[..., None]
            found = base.gather(wanted.clamp(max=begin - 1), heads)
            pairs.append(tuple(torch.where(inside, x, y) for x, y in zip(found, own_tokens)))
        return tuple(torch.stack(x) for x in zip(*pairs))

    def blocks(self, row: int, group: int, numbers: torch.Tensor) -> Pair:
        base, begin = self.bases[row], self.begins[row] // self.shape.size
        split = int((numbers < begin).sum())  # numbers rise
        parts = []
        if split:
            parts.append(base.blocks(group, numbers[:split]))
        if split < len(numbers):
            parts.append(self.own.blocks(row, group, numbers[split:] - begin))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(x) for x in zip(*parts))

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        order = function(torch.arange(len(self.bases))).tolist()
        self.own.map_batch(function)
        self.bases, self.begins = [self.bases[i] for i in order], [self.begins[i] for i in order]
        self.shape = self.own.shape

    def stored(self) -> dict[str, torch.Tensor]:
        return self.own.stored()

    def reset(self) -> None:
        raise ValueError("`cache` begins with a bank: attach the bank anew instead of `reset()`.")

    def bytes(self) -> dict[str, int]:
        return self.own.bytes()


def open_store(kind: str, path, has_memory: bool) -> StoreFolder | None:
    """The folder of a cache's arguments `store` and `path`, if there is one.

    Raises:
        ValueError: what does not fit together.
    """
    if kind not in STORES:
        raise ValueError(f"`store` must be one of {', '.join(map(repr, STORES))}, got {kind!r}.")
    if kind != "device" and not has_memory:
        raise ValueError(f"`store` is for layers with a memory, and `config` has none, got {kind!r}.")
    if (kind == "disk") != (path is not None):
        raise ValueError(f"`path` names the folder of store='disk' and of no other, got {path!r} with {kind!r}.")
    if path is None or isinstance(path, StoreFolder):
        return path
    return StoreFolder(path, is_new=True)


def refuse_rows_on_disk(cache) -> None:
    """Raises a ValueError for a cache whose rows cannot be doubled, before work starts that doubles them."""
    if getattr(cache, "folder", None) is not None:
        raise ValueError(
            "`num_beams`: beam search doubles rows, which a cache on disk cannot: use store='cpu' or 'device', behind "
            "a bank if the text is to stay on disk."
        )


def make_store(kind: str, shape: Shape, folder: StoreFolder | None, layer: int) -> TensorStore | FileStore:
    """An empty one."""
    if kind != "disk":
        return TensorStore(shape, kind == "device")
    return FileStore(shape, [RowFiles(folder, layer, row, shape) for row in range(shape.batch)])
