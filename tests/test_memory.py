"""Attention with a memory: the laws of a choice, and the fast path against the naive definition."""

import itertools

import pytest
import torch

from modeling_longnet import memory_attention, memory_search
from modeling_longnet.dilated_attention import dilated_attention, scheduled_attention
from modeling_longnet.dilation_schedule import DilationSchedule, Heads
from modeling_longnet.memory_attention import MemoryCall, attend_memory, choose
from modeling_longnet.memory_pieces import PieceAttention
from modeling_longnet.memory_reference import memory_attention_reference
from modeling_longnet.memory_rows import RowAttention
from modeling_longnet.memory_search import Ranking, best_blocks, choose_blocks, hide_ineligible, rank_blocks
from modeling_longnet.memory_spec import MemorySpec


INV_FREQ = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
# Far more blocks than are chosen: a choice of everything would hide a wrong one.
CASES = {
    "blocks-of-4": ([8], [1], 2, {"block_size": 4, "top_k": 2}),
    "no-sinks-uneven": ([14], [1], 0, {"block_size": 3, "top_k": 3, "rank": "mean"}),
    "sinks-in-a-block": ([12], [1], 5, {"block_size": 4, "top_k": 2, "rank": "bound"}),
    "more-sinks-than-window": ([8], [1], 9, {"block_size": 2, "top_k": 2}),
    "more-clamped-sinks-than-window": ([8, 20], [1, 3], 13, {"block_size": 4, "top_k": 2, "max_distance": 10}),
    "single-keys": ([6], [1], 3, {"block_size": 1, "top_k": 5}),
    "beside-dilated": ([8, 16, 64], [1, 2, 4], 2, {"block_size": 4, "top_k": 3}),
    "beside-uneven-dilated": ([9, 20], [1, 3], 1, {"block_size": 2, "top_k": 4}),
    "clamped": ([8], [1], 2, {"block_size": 4, "top_k": 3, "max_distance": 20}),
    "clamped-beside-dilated": ([8, 32], [1, 2], 6, {"block_size": 4, "top_k": 3, "max_distance": 9}),
    "one-head": ([8], [1], 2, {"block_size": 4, "top_k": 2, "heads": {3: [0]}}),
    "one-head-clamped-beside-dilated": (
        [8, 32], [1, 2], 6, {"block_size": 4, "top_k": 3, "max_distance": 9, "heads": {3: [0]}}
    ),
    "no-head-clamped": ([8, 32], [1, 2], 3, {"block_size": 4, "top_k": 3, "max_distance": 9, "heads": {3: []}}),
}


def make_schedule(name: str, **changes) -> DilationSchedule:
    lengths, rates, sinks, memory = CASES[name]
    return DilationSchedule(
        lengths, rates, overlap="once", local="sliding", num_sink_tokens=sinks, memory=memory | changes
    )  # fmt: skip


def make_tensors(length, heads=4, groups=2, batch=2, width=8, dtype=torch.float64, queries=None):
    shapes = [(batch, heads, queries or length, width), *[(batch, groups, length, width)] * 2]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def make_call(schedule, query, key, backend="sdpa"):
    start = key.shape[2] - query.shape[2]
    return MemoryCall(Ranking(schedule, INV_FREQ), start, Heads.of(query, key), 0.4, backend)


def naive(call, *tensors, **options):
    return memory_attention_reference(*tensors, call.schedule, call.start, scale=0.4, inv_freq=INV_FREQ, **options)


def as_sets(chosen: torch.Tensor) -> torch.Tensor:
    return chosen.sort(-1).values if (chosen >= 0).any() else chosen[..., :0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "pieces"])
def test_the_fast_path_is_the_definition_with_its_gradients(name, backend, monkeypatch):
    if backend == "pieces":  # what GPUs run
        monkeypatch.setattr(memory_attention, "part_attention", lambda device: PieceAttention)
        backend = "sdpa"
    for length, queries, (heads, groups) in itertools.product((1, 7, 67), (None, 5), ((4, 2), (3, 1), (2, 2))):
        query, key, value = make_tensors(length, heads, groups, queries=min(length, queries or length))
        call = make_call(make_schedule(name), query, key, backend)
        out, lse = attend_memory(call, query, key, value)
        wanted = naive(call, query, key, value)
        assert torch.equal(as_sets(choose(call, query, key)), as_sets(wanted[2]))
        torch.testing.assert_close((out, lse), wanted[:2], rtol=0, atol=1e-12)
        loss_weights = torch.randn_like(out), torch.randn_like(lse)
        got, expected = (
            torch.autograd.grad(sum((a * b).sum() for a, b in zip(result, loss_weights)), (query, key, value))
            for result in ((out, lse), wanted[:2])
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_err_at_most_twice_as_much_as_the_naive_path(dtype):
    query, key, value = make_tensors(130, 4, 2, dtype=dtype)
    call = make_call(make_schedule("beside-dilated"), query, key)
    chosen = choose(call, query, key)
    exact = naive(call, *(x.double() for x in (query, key, value)), chosen=chosen)[0]
    plain = naive(call, query, key, value, chosen=chosen)[0]
    out = attend_memory(call, query, key, value, chosen=chosen)[0]
    assert out.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2 * (plain.double() - exact).abs().max().item()
    assert (out.double() - exact).abs().max().item() <= bound


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "pieces"])
def test_autocast_rounds_what_comes_in_and_nothing_else(name, backend, monkeypatch):
    """Ranks, logits and sums stay in float32, whether the backward runs under autocast or not."""
    if backend == "pieces":
        monkeypatch.setattr(memory_attention, "part_attention", lambda device: PieceAttention)
    tensors, schedule = make_tensors(130, dtype=torch.float32), make_schedule(name)
    rounded, grads = [x.detach().bfloat16().requires_grad_() for x in tensors], []
    expected = scheduled_attention(*rounded, schedule, inv_freq=INV_FREQ)
    for given, is_inside in ((rounded, None), (tensors, False), (tensors, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_inside is not None):
            out = scheduled_attention(*given, schedule, inv_freq=INV_FREQ)
            grads += [torch.autograd.grad(out.float().square().sum(), given)] if is_inside else []
        grads += [] if is_inside else [torch.autograd.grad(out.float().square().sum(), given)]
        assert torch.equal(out, expected)
    for got in grads[1:]:
        assert all(torch.equal(a.float(), b) for a, b in zip(grads[0], got))


@pytest.mark.parametrize("name", CASES)
def test_what_comes_later_changes_nothing_before_it(name):
    query, key, value = (x.detach() for x in make_tensors(80))
    schedule = make_schedule(name)
    call = make_call(schedule, query, key)
    before = attend_memory(call, query, key, value)[0], choose(call, query, key)
    edited = [torch.cat([x[:, :, :53], 5 * torch.randn_like(x[:, :, 53:])], dim=2) for x in (query, key, value)]
    after = attend_memory(call, *edited)[0], choose(call, *edited[:2])
    assert torch.equal(before[1][:, :, :53], after[1][:, :, :53])
    torch.testing.assert_close(before[0][:, :, :53], after[0][:, :, :53], rtol=0, atol=1e-12)
    assert not torch.allclose(before[0][:, :, 53:], after[0][:, :, 53:])


@pytest.mark.parametrize("name", [n for n in CASES if "clamped" not in n and n != "one-head"])
def test_choosing_all_blocks_is_dense_causal_attention(name):
    query, key, value = (x.detach() for x in make_tensors(75))
    call = make_call(make_schedule(name, top_k=99), query, key)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, scale=0.4
    )  # fmt: skip
    torch.testing.assert_close(attend_memory(call, query, key, value)[0], dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_queries_read_in_any_pieces_read_the_same(name):
    query, key, value = (x.detach() for x in make_tensors(71))
    schedule = make_schedule(name)
    whole = attend_memory(make_call(schedule, query, key), query, key, value)[0]
    chosen = choose(make_call(schedule, query, key), query, key)
    for begin, end in ((0, 20), (20, 21), (21, 50), (50, 71)):
        part = query[:, :, begin:end], key[:, :, :end], value[:, :, :end]
        call = make_call(schedule, *part[:2])
        assert torch.equal(as_sets(choose(call, *part[:2])), as_sets(chosen[:, :, begin:end]))
        torch.testing.assert_close(attend_memory(call, *part)[0], whole[:, :, begin:end], rtol=0, atol=1e-12)


def test_documents_and_padding_are_rows_of_their_own():
    query, key, value = (x.detach() for x in make_tensors(90, batch=2))
    ids = torch.tensor([[-1] * 23 + [0] * 67, [4] * 30 + [7] * 60])
    arguments = make_schedule("blocks-of-4").as_arguments()
    out = dilated_attention(query, key, value, document_ids=ids, **arguments)
    assert not out[0, :, :23].any()
    for row, part in ((0, slice(23, 90)), (1, slice(0, 30)), (1, slice(30, 90))):
        alone = dilated_attention(*(x[row : row + 1, :, part] for x in (query, key, value)), **arguments)
        torch.testing.assert_close(out[row : row + 1, :, part], alone, rtol=0, atol=1e-12)


def test_of_equal_blocks_the_newer_are_chosen_and_the_set_is_exact():
    ranks = torch.randint(0, 40, (50, 333)).float()
    ranks[3, 100:] = -torch.inf
    ranks[4, 2:] = -torch.inf
    for count in (1, 5, 40, 400):
        wanted = 332 - ranks.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
        wanted = torch.where(ranks.gather(-1, wanted) == -torch.inf, -1, wanted)
        wanted = torch.nn.functional.pad(wanted, (0, count - wanted.shape[-1]), value=-1)
        assert torch.equal(as_sets(best_blocks(ranks, count)), as_sets(wanted))
    repeated = torch.ones(1, 1, 60, 8, dtype=torch.float64)
    call = make_call(make_schedule("blocks-of-4"), repeated, repeated)
    chosen = choose(call, repeated, repeated)
    assert as_sets(chosen)[0, 0, -1].tolist() == [12, 13]  # the window of query 59 begins at 56, extended from 56


def flat_choice(ranks: torch.Tensor, count: int) -> torch.Tensor:
    """The definition: sorted by rank, the newer first among equals; then rising, -1 behind."""
    last = ranks.shape[-1] - 1
    order = last - ranks.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    order = torch.where(ranks.gather(-1, order) == -torch.inf, last + 1, order).sort(-1).values
    order = torch.where(order > last, -1, order)
    return torch.nn.functional.pad(order, (0, max(0, count - ranks.shape[-1])), value=-1)


def adversarial_ranks(kind: str, n: int) -> torch.Tensor:
    ranks = torch.randn(40, n)
    if kind == "ties":
        return torch.randint(-3, 4, (40, n)).float()
    if kind == "all-equal":
        return torch.full((40, n), -2.5)
    if kind == "ties-at-the-threshold":  # and nowhere else
        return ranks.where(ranks < ranks.quantile(0.98, dim=-1, keepdim=True), 9.0)
    if kind == "few-finite":
        return ranks.where(torch.rand(40, n) < 3 / n, -torch.inf)
    if kind == "none":
        return torch.full((40, n), -torch.inf)
    if kind == "best-side-by-side":
        ranks[:, n // 3 : n // 3 + n // 5] += 50
    if kind == "best-in-one-group":  # of blocks that are looked at together
        ranks[:, :: max(1, n // 16)] += 50
    return ranks


@pytest.mark.parametrize("threads", [memory_search.FEW_THREADS, 0])
@pytest.mark.parametrize(
    "kind",
    ["random", "ties", "all-equal", "ties-at-the-threshold", "few-finite", "none", "best-side-by-side",
     "best-in-one-group"],
)  # fmt: skip
def test_the_best_blocks_are_those_of_a_sort_whatever_the_ranks(kind, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(memory_search, "FEW_THREADS", threads)  # with NumPy, and without
    for n, count in itertools.product((1, 2, 63, 64, 65, 66, 130, 517, 1024, 2051), (1, 4, 64)):
        ranks = adversarial_ranks(kind, n)
        assert torch.equal(best_blocks(ranks, count), flat_choice(ranks, count)), (n, count)
        assert torch.equal(best_blocks(ranks[:0], count), flat_choice(ranks[:0], count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_texts_choice_is_exact_with_equal_keys_and_far_distances(dtype, monkeypatch):
    """Small integers, of which float32 makes no error, so that many ranks are equal; in tiles and turned indices."""
    memory = {"block_size": 4, "top_k": 8, "rank": "bound"}
    schedule = DilationSchedule([16], [1], overlap="once", local="sliding", num_sink_tokens=4, memory=memory)
    query = torch.randint(-2, 3, (2, 4, 1203, 8)).to(dtype)
    key = torch.randint(-1, 2, (2, 2, 1203, 8)).to(dtype)
    key[:, :, 400:800] = key[:, :, :400]
    key[1, :, 900:] = 1
    call = make_call(schedule, query, key)
    chosen = choose(call, query, key)
    wanted = naive(call, query.double(), key.double(), key.double())[2]
    assert torch.equal(as_sets(chosen), as_sets(wanted))
    assert torch.equal(chosen, torch.where(chosen < 0, 9999, chosen).sort(-1).values.where(chosen >= 0, -1))  # rising
    monkeypatch.setattr(memory_search, "TILE_SIZE", 2**14)
    monkeypatch.setattr(memory_search, "MANY_ROWS", 10**9)
    assert torch.equal(choose(call, query, key), chosen)


@pytest.mark.parametrize("oldest", [0, 1, 5, 11, 14])
@pytest.mark.parametrize("name", [n for n in CASES if n != "no-head-clamped"])
def test_blocks_from_the_oldest_on_are_chosen_as_if_those_before_had_no_rank(name, oldest):
    query, key, _ = make_tensors(75, queries=12)
    schedule, ranking = make_schedule(name), Ranking(make_schedule(name), INV_FREQ)
    size, position, query = schedule.memory.block_size, torch.arange(63, 75), ranking.own_queries(query, 2)
    index, far = (ranking.index(key),), (ranking.far_index(key),) if "clamped" in name else None
    ranks = rank_blocks(ranking, query, index, far, position, 75 // size)
    hide_ineligible(ranks, schedule, schedule.local_start(position))
    ranks[..., :oldest] = -torch.inf
    wanted = flat_choice(ranks, schedule.memory.top_k).flatten(1, 2)
    assert torch.equal(choose_blocks(ranking, query, index, far, 63, oldest), wanted)


@pytest.mark.parametrize("name", ["clamped", "clamped-beside-dilated", "sinks-in-a-block"])
def test_chosen_blocks_may_be_given_in_any_order(name, monkeypatch):
    query, key, value = make_tensors(90)
    call = make_call(make_schedule(name), query, key)
    chosen = choose(call, query, key)
    expected = attend_memory(call, query, key, value, chosen)[0]
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    monkeypatch.setattr(RowAttention, "PAIRS", 50)  # in many stretches
    actual = attend_memory(call, query, key, value, chosen.flip(-1))[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    again = torch.autograd.grad((actual * weights).sum(), (query, key, value))
    torch.testing.assert_close(again, gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_each_query_sees_each_key_once(name):
    """With logits near 0 and the identity as values, the output is the weights: 1 / (number of keys seen), or 0."""
    query, key, _ = (x.detach() for x in make_tensors(64, heads=2, groups=1, batch=1, width=64))
    value = torch.eye(64, dtype=torch.float64)[None, None]
    weights = attend_memory(make_call(make_schedule(name), 1e-13 * query, key), 1e-13 * query, key, value)[0]
    seen = weights > 1e-6
    torch.testing.assert_close(weights, seen.double() / seen.sum(-1, keepdim=True), rtol=0, atol=1e-9)
    assert seen[..., -1, :].sum(-1).max() < 40


def test_memory_off_takes_the_path_of_before():
    query, key, value = (x.detach() for x in make_tensors(60))
    schedule = DilationSchedule([8, 16], [1, 2], overlap="once", local="sliding", num_sink_tokens=2)
    assert "memory" not in schedule.as_arguments()
    plain = dilated_attention(query, key, value, **schedule.as_arguments())
    assert torch.equal(plain, dilated_attention(query, key, value, memory=None, **schedule.as_arguments()))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"block_size": 0}, "block_size"),
        ({"top_k": True}, "top_k"),
        ({"rank": "best"}, "rank"),
        ({"layers": "all"}, "layers"),
        ({"max_distance": 3}, "max_distance"),
        ({"blocks": 3}, "dictionary"),
        ("yes", "dictionary"),
        ({"block_size": 64}, "window"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, word):
    with pytest.raises(ValueError, match=word):
        DilationSchedule([8], [1], overlap="once", local="sliding", memory=settings)


def test_what_a_memory_does_not_go_with_is_refused():
    with pytest.raises(ValueError, match="sliding"):
        DilationSchedule([8], [1], memory={})
    query, key, value = make_tensors(30)
    arguments = make_schedule("clamped").as_arguments()
    with pytest.raises(ValueError, match="inv_freq"):
        dilated_attention(query, key, value, **arguments)


def test_settings_are_plain_json():
    spec = MemorySpec(layers=[3, 1])
    assert MemorySpec.from_dict(spec.to_dict()) == spec and spec.to_dict()["layers"] == [1, 3]
    assert spec.reads_in(3) and not spec.reads_in(2) and MemorySpec().reads_in(7)
