"""Which keys a query reads: the sparse attentions that are nothing but a set of pairs.

Each pattern says three things: which of some pairs are visible, which keys a run of queries has to look at, and which
keys no later query will read. `pattern_attention` does the rest. Queries of `SlidingWindow(3)`, `Strided(3)` and
`Fixed(3, 1)` at positions 0 to 6, x a visible key:

    x . . . . . .     x . . . . . .     x . . . . . .
    x x . . . . .     x x . . . . .     x x . . . . .
    x x x . . . .     x x x . . . .     x x x . . . .
    . x x x . . .     x x x x . . .     . . x x . . .
    . . x x x . .     . x x x x . .     . . x x x . .
    . . . x x x .     . . x x x x .     . . x x x x .
    . . . . x x x     x . . x x x x     . . x . . x x

Letters: H heads, or 1 where all read alike, Q queries, K keys, w window, l stride.
"""

import torch


class Pattern:
    """Positions are integers [Q] and [K]; masks are true where a query may read a key."""

    query_block = 128

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[H or 1, Q, K]."""
        raise NotImplementedError

    def candidates(self, start: int, stop: int) -> torch.Tensor:
        """Positions of all keys that queries start to stop - 1 read, and perhaps of others, sorted."""
        raise NotImplementedError

    def still_read(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        """[K], whether a query at `position` or later may read the key. Default: any key."""
        return torch.ones_like(keys, dtype=torch.bool)

    def __add__(self, other: "Pattern") -> "Union":
        return Union(self, other)


def _distance(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return queries[:, None] - keys[None]


class Union(Pattern):
    """Pairs of either pattern, under one softmax."""

    def __init__(self, *patterns: Pattern):
        self.patterns = patterns
        self.query_block = min(pattern.query_block for pattern in patterns)

    def visible(self, queries, keys):
        first, *others = (pattern.visible(queries, keys) for pattern in self.patterns)
        for other in others:
            first = first | other
        return first

    def candidates(self, start, stop):
        return torch.cat([pattern.candidates(start, stop) for pattern in self.patterns]).unique()

    def still_read(self, keys, position):
        return torch.stack([pattern.still_read(keys, position) for pattern in self.patterns]).any(0)


class Bounded(Pattern):
    """Those pairs of a pattern that are less than `reach` apart."""

    def __init__(self, pattern: Pattern, reach: int):
        self.pattern, self.reach = pattern, reach
        self.query_block = pattern.query_block

    def visible(self, queries, keys):
        return self.pattern.visible(queries, keys) & (_distance(queries, keys) < self.reach)

    def candidates(self, start, stop):
        keys = self.pattern.candidates(start, stop)
        return keys[keys > start - self.reach]

    def still_read(self, keys, position):
        return self.pattern.still_read(keys, position) & (keys > position - self.reach)


class SlidingWindow(Pattern):
    """The last `window` tokens of every `dilation`-th one, the query's own included; a dilation for each head, or one.

    Longformer (arXiv 2004.05150), section 3.1: windows, and dilated windows on a few heads.
    """

    def __init__(self, window: int, dilation: int | list[int] = 1):
        self.window = window
        self.dilations = torch.tensor([dilation] if isinstance(dilation, int) else dilation)[:, None, None]
        self.reach = window * int(self.dilations.max())

    def visible(self, queries, keys):
        distance, dilations = _distance(queries, keys), self.dilations.to(queries.device)
        return (distance >= 0) & (distance < self.window * dilations) & (distance % dilations == 0)

    def candidates(self, start, stop):
        return torch.arange(max(0, start - self.reach + 1), stop)

    def still_read(self, keys, position):
        return keys > position - self.reach


class GlobalTokens(Pattern):
    """The first `count` tokens, which every later one reads."""

    def __init__(self, count: int):
        self.count = count

    def visible(self, queries, keys):
        return ((_distance(queries, keys) >= 0) & (keys < self.count))[None]

    def candidates(self, start, stop):
        return torch.arange(min(self.count, stop))

    def still_read(self, keys, position):
        return keys < self.count


class Strided(Pattern):
    """The last l tokens and every l-th before: Sparse Transformer (arXiv 1904.10509), section 4.2, merged heads.

    `strided_attention` computes the same faster; this is for decoding.
    """

    def __init__(self, stride: int):
        self.stride = stride

    def visible(self, queries, keys):
        distance = _distance(queries, keys)
        return ((distance >= 0) & ((distance < self.stride) | (distance % self.stride == 0)))[None]

    def candidates(self, start, stop):
        window = torch.arange(max(0, start - self.stride + 1), stop)
        if stop - start >= self.stride:
            return torch.arange(stop)
        columns = [torch.arange(query % self.stride, query + 1, self.stride) for query in range(start, stop)]
        return torch.cat([window, *columns]).unique()


class Fixed(Pattern):
    """The query's own block of l tokens and the last c of every earlier block: as before, section 4.2, fixed."""

    def __init__(self, stride: int, summary: int):
        self.stride, self.summary = stride, summary
        self.query_block = stride

    def _is_summary(self, keys):
        return keys % self.stride >= self.stride - self.summary

    def visible(self, queries, keys):
        own = queries[:, None] // self.stride == keys[None] // self.stride
        return ((_distance(queries, keys) >= 0) & (own | self._is_summary(keys)))[None]

    def candidates(self, start, stop):
        earlier = torch.arange(start // self.stride * self.stride)
        return torch.cat([earlier[self._is_summary(earlier)], torch.arange(len(earlier), stop)])

    def still_read(self, keys, position):
        return self._is_summary(keys) | (keys >= position // self.stride * self.stride)


class RandomBlocks(Pattern):
    """For each head and block of queries `count` earlier blocks by chance: BigBird (arXiv 2007.14062), section 2.

    The draw depends on seed, head and block alone, so it is the same at every length, in training and in decoding.
    """

    def __init__(self, block: int, count: int, num_heads: int, seed: int = 0):
        self.block, self.count, self.num_heads, self.seed = block, count, num_heads, seed
        self.query_block = block
        self._drawn: dict[int, torch.Tensor] = {}

    def blocks(self, query_block: int) -> torch.Tensor:
        """The key blocks of a query block, [H, count]; -1 where there are fewer earlier blocks."""
        if query_block not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + query_block)
            draws = torch.rand(self.num_heads, query_block, generator=generator).argsort(1)[:, : self.count]
            self._drawn[query_block] = torch.nn.functional.pad(draws, (0, self.count - draws.shape[1]), value=-1)
        return self._drawn[query_block]

    def visible(self, queries, keys):
        own = queries // self.block
        first = int(own[0])
        table = torch.stack([self.blocks(i) for i in range(first, int(own[-1]) + 1)], 1)  # [H, query blocks, count]
        chosen = table.to(keys.device)[:, own - first]  # [H, Q, count]
        return (chosen[..., None] == (keys // self.block)).any(2)

    def candidates(self, start, stop):
        own = range(start // self.block, (stop - 1) // self.block + 1)
        chosen = torch.cat([self.blocks(i).flatten() for i in own]).unique()
        return (chosen[chosen >= 0, None] * self.block + torch.arange(self.block)).flatten()
