"""Random cases of the operator, shared by the tests of the plan, of the operator and of what stands on it."""

import random
from dataclasses import dataclass, field

import torch


@dataclass
class Case:
    """One call of `dilated_attention`: its schedule, its shapes and the rest of its arguments."""

    segment_lengths: list[int]
    dilation_rates: list[int]
    batch: int
    num_heads: int
    num_kv_heads: int
    length: int
    query_length: int
    width: int
    options: dict = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[torch.Tensor]:
        """Query, key, value and the gradient of the output, drawn in float64 whatever the dtype."""
        shapes = [
            (self.query_length, self.num_heads),
            (self.length, self.num_kv_heads),
            (self.length, self.num_kv_heads),
        ]
        shapes.append(shapes[0])
        tensors = [torch.randn(self.batch, n, h, self.width, dtype=torch.float64) for n, h in shapes]
        return [x.to(device, dtype).transpose(1, 2) for x in tensors]


def random_patterns(rng: random.Random) -> tuple[list[int], list[int]]:
    count = rng.randint(1, 4)
    if rng.random() < 0.5:
        base, ratio = rng.choice([4, 6, 8]), rng.choice([2, 3])
        return [base * ratio**i for i in range(count)], [ratio**i for i in range(count)]
    lengths = sorted(rng.randint(1, 40) for _ in range(count))
    rates = sorted(min(rng.randint(1, 6), w) for w in lengths)
    return lengths, rates


def random_documents(rng: random.Random, batch: int, length: int) -> torch.Tensor:
    """Rows of up to five runs, some of them padding (negative)."""
    ids = torch.zeros(batch, length, dtype=torch.long)
    for row in range(batch):
        for cut in sorted(rng.randint(0, length) for _ in range(4)):
            ids[row, cut:] = rng.randint(-1, 3)
    return ids


def random_case(seed: int) -> Case:
    """Every option of the operator, drawn independently where they may be combined."""
    rng = random.Random(seed)
    lengths, rates = random_patterns(rng)
    is_causal = rng.random() < 0.6
    overlap = rng.choice(["count", "once"])
    zeros = not is_causal and overlap == "count" and rng.random() < 0.5
    options = {
        "is_causal": is_causal,
        "overlap": overlap,
        "head_offsets": rng.choice(["modulo", "contiguous"]),
        "num_sink_tokens": 0 if zeros else rng.choice([0, 0, 1, 3, 9]),
        "padding": "zeros" if zeros else "mask",
        "local": rng.choice(["segment", "sliding"]) if is_causal and rates[0] == 1 else "segment",
        "scale": rng.choice([None, 0.5]),
    }
    groups = rng.choice([1, 2, 3])
    heads = groups * rng.choice([1, 2, 3])
    batch, length = rng.choice([1, 2, 3]), rng.randint(1, 90)
    queries = length if rng.random() < 0.5 else rng.randint(1, length)
    if rng.random() < 0.3:
        options["query_offset"] = rng.randint(0, length - queries)
    if rng.random() < 0.3:
        options |= {"head_index_offset": 2, "total_num_heads": heads + 3}
    if rng.random() < 0.4:
        options["document_ids"] = random_documents(rng, batch, length)
    return Case(lengths, rates, batch, heads, groups, length, queries, rng.choice([4, 5, 8]), options)
