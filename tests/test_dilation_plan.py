"""The plan holds each (query, key) pair in exactly as many blocks as the definition counts it."""

import pytest
import torch
from operator_cases import random_case

from modeling_longnet.dilated_attention_reference import attention_counts
from modeling_longnet.dilation_plan import iterate_blocks, plan_bands, plan_blocks
from modeling_longnet.dilation_schedule import DilationSchedule, Heads


def counts_of(blocks, num_heads, query_length, length, query_start):
    """What the blocks add up to: [H, Q, N] pairs and [H, Q] zero keys."""
    pairs, zeros = torch.zeros(num_heads, query_length, length), torch.zeros(num_heads, query_length)
    touched = torch.zeros(num_heads, query_length, dtype=torch.bool)
    for block in blocks:
        kind, q, k = block.region.kind, block.region.queries, block.region.keys
        triangle = {"full": lambda x: x, "causal": torch.tril, "reversed": torch.triu}
        triangle["band"] = lambda x: x.triu().tril(x.shape[1] - x.shape[0])
        for repeat in range(block.repeats):
            shift = repeat * block.stride
            queries = torch.arange(q.count) * q.step + q.start + shift - query_start
            keys = torch.arange(k.count) * k.step + k.start + shift
            assert 0 <= queries.min() and queries.max() < query_length
            for head in range(num_heads)[block.heads]:
                assert not (block.fresh and touched[head, queries].any())
                touched[head, queries] = True
                if kind == "zeros":
                    zeros[head, queries] += k.count
                else:
                    assert 0 <= keys.min() and keys.max() < length
                    assert kind in ("full", "band") or q.count == k.count
                    pairs[head][queries[:, None], keys] += triangle[kind](torch.ones(q.count, k.count))
    return pairs, zeros


@pytest.mark.parametrize("first_seed", range(0, 600, 100))
def test_blocks_equal_the_definition(first_seed):
    for seed in range(first_seed, first_seed + 100):
        case = random_case(seed)
        options = {name: x for name, x in case.options.items() if name in DilationSchedule.__dataclass_fields__}
        schedule = DilationSchedule(tuple(case.segment_lengths), tuple(case.dilation_rates), **options)
        start = case.options.get("query_offset", case.length - case.query_length)
        first_head, total = case.options.get("head_index_offset", 0), case.options.get("total_num_heads")
        documents = torch.zeros(1, case.length, dtype=torch.long)
        counts, zeros = attention_counts(
            schedule, case.num_heads, documents, start, case.query_length, first_head, total
        )
        heads = Heads(case.num_heads, case.num_kv_heads, first_head, total)
        stop = start + case.query_length
        plans = {plan: plan(schedule, heads, start, stop, case.length) for plan in (plan_blocks, plan_bands)}
        plans["bands of a backward"] = plan_bands(schedule, heads, start, stop, case.length, backward=True)
        plans["bands of 3"] = [*iterate_blocks(schedule, heads, (start, stop), case.length, 3)]
        for plan, blocks in plans.items():
            got = counts_of(blocks, case.num_heads, case.query_length, case.length, start)
            assert torch.equal(counts[0], got[0]), (seed, case, plan)
            assert torch.equal(zeros[0], got[1]), (seed, case, plan)


def test_plan_of_the_papers_schedule_is_small():
    """A million tokens must not mean a million blocks."""
    schedule = DilationSchedule((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
    assert len(plan_blocks(schedule, Heads(12, 12), 0, 2**20, 2**20)) <= 2 * (1 + 2 + 4 + 6 + 12)


def test_schedule_draws_what_it_does():
    """The picture in the docstring of DilationSchedule."""
    drawn = [line.split()[2:] for line in DilationSchedule.__doc__.splitlines() if line.strip().startswith("query ")]
    counts, _ = attention_counts(DilationSchedule((4, 8), (1, 2)), 1, torch.zeros(1, 8, dtype=torch.long), 0, 8)
    assert [["." if c == 0 else str(int(c)) for c in row] for row in counts[0, 0]] == drawn
