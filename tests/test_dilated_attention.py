"""The operator against its float64 definition: forward, gradients, every option, every dtype, every backend."""

import itertools
import math

import pytest
import torch
from operator_cases import Case, random_case
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling_longnet import DilatedAttention
from modeling_longnet.dilated_attention import _forward_op, dilated_attention
from modeling_longnet.dilated_attention_reference import dilated_attention_reference
from modeling_longnet.dilation_schedule import DilationSchedule


def evaluate(function, case, tensors, grad, **options):
    """(out, lse, dq, dk, dv) of one call."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    schedule = (case.segment_lengths, case.dilation_rates)
    out, lse = function(*leaves, *schedule, return_lse=True, **case.options, **options)
    grads = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), *grads


def assert_close(got, wanted, tolerance, label):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        assert x.shape == y.shape, (name, label)
        finite = ~torch.isinf(y)
        assert torch.equal(finite, ~torch.isinf(x.double())), (name, label)
        if finite.any():
            error, size = (x.double() - y)[finite].abs().max(), y[finite].abs().max()
            assert error <= tolerance * max(1.0, size.item()), (name, error.item(), label)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("first_seed", range(0, 400, 50))
def test_equals_the_float64_reference(backend, first_seed):
    for seed in range(first_seed, first_seed + 50):
        case = random_case(seed)
        *tensors, grad = case.tensors()
        wanted = evaluate(dilated_attention_reference, case, tensors, grad)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
            low = [x.to(dtype) for x in tensors]
            got = evaluate(dilated_attention, case, low, grad.to(dtype), backend=backend)
            assert got[0].dtype == dtype
            assert_close(got, wanted, tolerance, (seed, dtype, case))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_window_in_bands_equals_the_reference(num_kv_heads):
    """Windows that are wider than the bands of one plan, with queries left over and others before the first one."""
    options = {"local": "sliding", "overlap": "once", "num_sink_tokens": 3, "query_offset": 37}
    case = Case([280, 840], [1, 3], 2, 4, num_kv_heads, 700, 663, 8, options)
    *tensors, grad = case.tensors()
    wanted = evaluate(dilated_attention_reference, case, tensors, grad)
    assert_close(evaluate(dilated_attention, case, tensors, grad), wanted, 1e-10, "float64")
    got = evaluate(dilated_attention, case, [x.float() for x in tensors], grad.float())
    assert_close(got, wanted, 1e-5, "float32")


@pytest.mark.parametrize("local", ["segment", "sliding"])
@pytest.mark.parametrize("turned", [[0], [1], [2], [3], [0, 1, 2, 3]], ids=str)
def test_channels_that_lie_apart_are_read_as_if_they_did_not(local, turned):
    """PyTorch's kernel on CPUs would read beside them. Queries one by one, in triangles and in bands."""
    for length, query_length in ((90, 90), (90, 1), (300, 290)):
        options = {"local": local, "overlap": "once", "num_sink_tokens": 1, "query_offset": length - query_length}
        case = Case([40, 120], [1, 3], 2, 4, 2, length, query_length, 8, options)
        *tensors, grad = case.tensors()
        wanted = evaluate(dilated_attention_reference, case, tensors, grad)
        *tensors, grad = (x.mT.contiguous().mT if i in turned else x for i, x in enumerate((*tensors, grad)))
        assert_close(evaluate(dilated_attention, case, tensors, grad), wanted, 1e-10, (length, query_length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_the_naive_path(dtype):
    """Errors against float64 of rounded inputs, summed over cases: at most twice those of the definition itself."""
    ours, naive = [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    for seed in range(40):
        case = random_case(seed)
        *tensors, grad = (x.to(dtype) for x in case.tensors())
        wanted = evaluate(dilated_attention_reference, case, [x.double() for x in tensors], grad.double())
        for total, function in ((ours, dilated_attention), (naive, dilated_attention_reference)):
            for i, (x, y) in enumerate(zip(evaluate(function, case, tensors, grad), wanted)):
                total[i] += (x.double() - y).nan_to_num(posinf=0, neginf=0).abs().max()
    assert (ours <= 2 * naive).all(), (ours, naive)


def test_the_reference_is_dense_attention_where_it_should_be():
    """With one segment over everything, and "once" for a short text, dilated attention is plain attention."""
    query, key, value = (torch.randn(2, heads, 40, 8, dtype=torch.float64) for heads in (6, 3, 3))
    for is_causal in (True, False):
        dense = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
        for schedule in (([64], [1]), ([64, 128], [1, 2])):
            out = dilated_attention_reference(
                query, key, value, *schedule, is_causal=is_causal, overlap="once", num_sink_tokens=4
            )
            torch.testing.assert_close(out, dense, rtol=0, atol=1e-14)


@pytest.mark.parametrize("overlap", ["count", "once"])
def test_the_reference_equals_a_sum_written_by_hand(overlap):
    """Three loops over positions and patterns, as the paper's text says it, for one head of offset 1."""
    w_r, length = [(4, 1), (8, 2), (12, 3)], 14
    query, key, value = (torch.randn(1, 2, length, 4, dtype=torch.float64) for _ in range(3))
    out = dilated_attention_reference(query, key, value, [w for w, _ in w_r], [r for _, r in w_r], overlap=overlap)
    for p in range(length):
        offered = [
            k for w, r in w_r for k in range(p + 1) if p // w == k // w and p % w % r == 1 % r and k % w % r == 1 % r
        ]
        offered = sorted(set(offered)) if overlap == "once" else offered
        weights = torch.stack([query[0, 1, p] @ key[0, 1, k] / 2 for k in offered]).softmax(0)
        wanted = sum(weight * value[0, 1, k] for weight, k in zip(weights, offered))
        torch.testing.assert_close(out[0, 1, p], wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("local", ["segment", "sliding"])
@pytest.mark.parametrize("overlap", ["count", "once"])
def test_causality(backend, local, overlap):
    """Nothing before a changed token changes, bit for bit; and the token itself matters."""
    query, key, value = (torch.randn(1, 4, 60, 8) for _ in range(3))
    options = {"overlap": overlap, "local": local, "num_sink_tokens": 2, "backend": backend}
    whole = dilated_attention(query, key, value, [8, 16, 48], [1, 2, 6], **options)
    for t in (0, 7, 8, 31, 47, 48, 59):
        changed = [x.clone() for x in (query, key, value)]
        for x in changed:
            x[:, :, t:] = torch.randn_like(x[:, :, t:])
        out = dilated_attention(*changed, [8, 16, 48], [1, 2, 6], **options)
        assert torch.equal(out[:, :, :t], whole[:, :, :t])
        assert not torch.equal(out[:, :, t], whole[:, :, t])


def test_batch_invariance():
    query, key, value = (torch.randn(5, 4, 50, 8) for _ in range(3))
    whole = dilated_attention(query, key, value, [8, 32], [1, 4])
    rows = [dilated_attention(*(x[i : i + 1] for x in (query, key, value)), [8, 32], [1, 4]) for i in range(5)]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=0, atol=1e-6)


def test_padding_invariance_and_packing():
    """A document gives the same numbers alone, behind padding, before padding and between other documents."""
    tokens = [torch.randn(1, 4, 30, 8) for _ in range(3)]
    alone = dilated_attention(*tokens, [8, 16], [1, 2], num_sink_tokens=2)
    for before, after in ((5, 0), (0, 7), (9, 11)):
        row = [torch.randn(1, 4, before + 30 + after, 8) for _ in range(3)]
        for x, document in zip(row, tokens):
            x[:, :, before : before + 30] = document
        for other in (-1, 3):
            ids = torch.full((1, before + 30 + after), other)
            ids[:, before : before + 30] = 0
            out = dilated_attention(*row, [8, 16], [1, 2], num_sink_tokens=2, document_ids=ids)
            torch.testing.assert_close(out[:, :, before : before + 30], alone, rtol=0, atol=1e-6)
            outside = torch.cat([out[:, :, :before], out[:, :, before + 30 :]], dim=2)
            assert (outside == 0).all() == (other == -1)


def test_cached_decode_equals_the_full_forward():
    query, key, value = (torch.randn(2, 4, 70, 8) for _ in range(3))
    whole = dilated_attention(query, key, value, [8, 32], [1, 4], overlap="once")
    for t in range(70):
        seen = (query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1])
        step = dilated_attention(*seen, [8, 32], [1, 4], overlap="once")
        torch.testing.assert_close(step, whole[:, :, t : t + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [3, torch.tensor(3)], ids=["int", "tensor"])
def test_a_static_cache_is_read_up_to_the_query(offset):
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 40, 8)
    out = dilated_attention(query, key, key, [4, 8], [1, 2], query_offset=offset)
    key[:, :, 8:] = torch.nan
    assert torch.equal(out, dilated_attention(query, key, key, [4, 8], [1, 2], query_offset=offset))


def test_a_slice_of_the_heads_equals_the_whole():
    """Ulysses and tensor parallelism hold some heads only: the offset follows the global index."""
    query, key, value = (torch.randn(1, heads, 40, 8) for heads in (8, 4, 4))
    for head_offsets in ("modulo", "contiguous"):
        whole = dilated_attention(query, key, value, [8, 24], [1, 3], head_offsets=head_offsets)
        parts = [
            dilated_attention(
                query[:, 2 * i : 2 * i + 2], key[:, i : i + 1], value[:, i : i + 1], [8, 24], [1, 3],
                head_offsets=head_offsets, head_index_offset=2 * i, total_num_heads=8,
            )
            for i in range(4)
        ]  # fmt: skip
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_the_log_sum_exp_has_its_gradient(backend):
    tensors = [torch.randn(1, 2, 20, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def grads(function, **options):
        out, lse = function(*tensors, [4, 8], [1, 2], return_lse=True, **options)
        return torch.autograd.grad((out * 2).sum() + lse.sin().sum(), tensors)

    for x, y in zip(grads(dilated_attention, backend=backend), grads(dilated_attention_reference)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_second_derivatives_through_eager():
    query = torch.randn(1, 2, 12, 3, dtype=torch.float64, requires_grad=True)

    def attend(x):
        return dilated_attention(x, x, x, [4, 8], [1, 2], num_sink_tokens=1, overlap="once", backend="eager")

    assert torch.autograd.gradgradcheck(attend, (query,))


def test_eager_drops_weights_and_keeps_their_mean():
    query, key = torch.randn(1, 2, 24, 4), torch.randn(1, 2, 24, 4)
    value = torch.ones(1, 2, 24, 4)
    out = dilated_attention(query, key, value, [8, 16], [1, 2], dropout=0.5)
    assert not torch.allclose(out, torch.ones_like(out))
    mean = torch.stack([dilated_attention(query, key, value, [8, 16], [1, 2], dropout=0.5) for _ in range(500)]).mean()
    assert abs(mean - 1) < 0.02


def test_queries_that_no_pattern_selects_give_zeros():
    query, key, value = (torch.randn(1, 1, 8, 4, requires_grad=True) for _ in range(3))
    out, lse = dilated_attention(query, key, value, [8], [2], return_lse=True)
    assert (out[:, :, 1::2] == 0).all() and (lse[:, :, 1::2] == -math.inf).all()
    assert (out[:, :, ::2] != 0).all() and lse[:, :, ::2].isfinite().all()
    out.sum().backward()
    assert (query.grad[:, :, 1::2] == 0).all() and value.grad[:, :, ::2].isfinite().all()


def test_only_inputs_out_and_lse_are_kept_for_the_backward():
    saved = []
    tensors = [torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        dilated_attention(*tensors, [8, 16, 64], [1, 2, 4])
    size = tensors[0].numel()
    assert sorted(saved) == [size // 8, size, size, size, size]


def layer(**options):
    return DilatedAttention(32, 4, [8, 16], [1, 2], **{"qk_norm": True, "overlap": "once"} | options)


def test_layer_keeps_shape_and_equals_the_operator():
    module, hidden = layer(num_key_value_heads=2), torch.randn(2, 50, 32)
    q, k, v = (
        norm(proj(hidden).unflatten(-1, (-1, 8)).transpose(1, 2))
        for proj, norm in (
            (module.q_proj, module.q_norm),
            (module.k_proj, module.k_norm),
            (module.v_proj, nn.Identity()),
        )
    )
    wanted = dilated_attention_reference(q, k, v, [8, 16], [1, 2], overlap="once").transpose(1, 2).flatten(2)
    out = module(hidden)
    assert out.shape == hidden.shape
    torch.testing.assert_close(out, module.o_proj(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    module, hidden = layer(), torch.randn(2, 50, 32, requires_grad=True)
    plain = torch.autograd.grad(module(hidden).square().sum(), hidden)[0]
    again = torch.autograd.grad if not use_reentrant else None
    loss = checkpoint(module, hidden, use_reentrant=use_reentrant).square().sum()
    if again:
        grad = again(loss, hidden)[0]
    else:
        loss.backward()
        grad = hidden.grad
    assert torch.equal(grad, plain)


def test_autocast():
    module, hidden = layer(), torch.randn(2, 50, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(hidden)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(hidden), rtol=0, atol=0.03)
    out.float().sum().backward()
    assert module.q_proj.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    module = layer()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    ids = torch.zeros(2, 47, dtype=torch.long)
    ids[0, :5], ids[1, 20:] = -1, 1
    for arguments in ((torch.randn(2, 50, 32),), (torch.randn(2, 61, 32),), (torch.randn(2, 47, 32), ids)):
        torch.testing.assert_close(compiled(*arguments), module(*arguments), rtol=0, atol=1e-6)
        compiled(*arguments).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # what PyTorch 2.14 checks, it warns of
def test_registered_operator_passes_pytorchs_own_checks():
    tensors = [torch.randn(2, 30, 4, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
    schedule = DilationSchedule((8, 16), (1, 2), overlap="once", num_sink_tokens=2).to_text()
    torch.library.opcheck(_forward_op, (*tensors, None, None, 0, [0, 0], schedule, 0.3, "sdpa"))


def query_key_value(heads=4, kv_heads=2, length=16, width=8):
    return [torch.randn(1, h, length, width) for h in (heads, kv_heads, kv_heads)]


BAD_ARGUMENTS = {
    "segment_lengths-empty": ({"segment_lengths": []}, "segment_lengths"),
    "segment_lengths-string": ({"segment_lengths": "[8, 16]"}, "segment_lengths"),
    "segment_lengths-float": ({"segment_lengths": [8.0, 16]}, "segment_lengths"),
    "segment_lengths-zero": ({"segment_lengths": [0, 16]}, "segment_lengths"),
    "segment_lengths-decrease": ({"segment_lengths": [16, 8]}, "decrease"),
    "dilation_rates-negative": ({"dilation_rates": [-1, 2]}, "dilation_rates"),
    "dilation_rates-decrease": ({"dilation_rates": [2, 1]}, "dilation_rates"),
    "dilation_rates-too-few": ({"dilation_rates": [1]}, "2 and 1"),
    "dilation_rates-exceed-segment": ({"dilation_rates": [1, 32]}, "rate 32 for length 16"),
    "head_offsets": ({"head_offsets": "mod"}, "'mod'"),
    "overlap": ({"overlap": "twice"}, "'twice'"),
    "padding": ({"padding": "zero"}, "'zero'"),
    "local": ({"local": "window"}, "'window'"),
    "num_sink_tokens-negative": ({"num_sink_tokens": -1}, "-1"),
    "num_sink_tokens-float": ({"num_sink_tokens": 1.5}, "1.5"),
    "zeros-causal": ({"padding": "zeros"}, "is_causal=True"),
    "zeros-once": ({"padding": "zeros", "is_causal": False, "overlap": "once"}, "'once'"),
    "sliding-bidirectional": ({"local": "sliding", "is_causal": False}, "is_causal=False"),
    "sliding-dilated": ({"local": "sliding", "dilation_rates": [2, 2]}, "got 2"),
    "dropout-one": ({"dropout": 1.0}, "1.0"),
    "dropout-fused": ({"dropout": 0.1, "backend": "sdpa"}, "dropout=0.1"),
    "backend-unknown": ({"backend": "triton"}, "'triton'"),
    "query_offset": ({"query_offset": 1}, "got 1 for 16 queries and 16 keys"),
    "document_ids-shape": ({"document_ids": torch.zeros(1, 5, dtype=torch.long)}, r"\(1, 5\)"),
    "document_ids-dtype": ({"document_ids": torch.zeros(1, 16)}, "float32"),
    "head_index_offset": ({"head_index_offset": 2, "total_num_heads": 4}, "2 and 4"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_named(arguments, said):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=said) as error:
        dilated_attention(*query_key_value(), **{"segment_lengths": [8, 16], "dilation_rates": [1, 2]} | arguments)
    assert name in str(error.value) or arguments.keys() & {"backend", "local", "padding"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: (q[0], k, v), "4 dimensions"),
        (lambda q, k, v: (q, k, v[:, :1]), "same shape"),
        (lambda q, k, v: (q[..., :4], k, v), "head dimension"),
        (lambda q, k, v: (q[:, :3], k, v), "multiple of the heads"),
        (lambda q, k, v: (q.half(), k, v), "float16"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "int64"),
        (lambda q, k, v: (q.to("meta"), k, v), "meta"),
        (lambda q, k, v: (q, 3, v), "`key` must be a tensor, got 3"),
    ],
    ids=["dimensions", "value-shape", "head-dim", "heads", "dtypes", "integers", "devices", "no-tensor"],
)
def test_bad_tensors_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        dilated_attention(*change(*query_key_value()), [8, 16], [1, 2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the message on a machine without CUDA")
def test_a_backend_asked_for_by_name_never_falls_back():
    with pytest.raises(ValueError, match="flash"):
        dilated_attention(*query_key_value(), [8, 16], [1, 2], backend="flash_attention_2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_heads": 5}, "32 and 5"),
        ({"num_key_value_heads": 3}, "4 and 3"),
        ({"backend": "fast"}, "'fast'"),
        ({"segment_lengths": [8]}, "1 and 2"),
    ],
    ids=["heads", "kv-heads", "backend", "schedule"],
)
def test_bad_layers_are_refused(arguments, said):
    good = {"hidden_size": 32, "num_heads": 4, "segment_lengths": [8, 16], "dilation_rates": [1, 2]}
    with pytest.raises(ValueError, match=said):
        DilatedAttention(**good | arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flash_attention_2"])
def test_option_matrix_on_cuda(dtype, backend):
    if backend == "flash_attention_2":
        pytest.importorskip("flash_attn")
        if dtype == torch.float32:
            pytest.skip("flash-attn has no float32")
    for seed, width in itertools.product(range(40), (16, 64)):
        case = random_case(seed)
        case.width = width
        if case.options.get("document_ids") is not None:
            case.options["document_ids"] = case.options["document_ids"].cuda()
        *tensors, grad = case.tensors(dtype, "cuda")
        wanted = evaluate(dilated_attention_reference, case, [x.double() for x in tensors], grad.double())
        naive = evaluate(dilated_attention_reference, case, tensors, grad)
        got = evaluate(dilated_attention, case, tensors, grad, backend=backend)
        for name, x, y, z in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, naive, strict=True):
            error, allowed = ((t.double() - y).nan_to_num(posinf=0, neginf=0).abs().max() for t in (x, z))
            floor = 1e-5 if dtype == torch.float32 else 1e-2
            assert error <= 2 * allowed + floor * y.nan_to_num(neginf=0).abs().max(), (
                seed,
                width,
                name,
                error,
                allowed,
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0, 0.0, -0.5])
def test_a_scale_that_is_not_positive_is_a_scale(scale, dtype):
    """PyTorch's CPU kernel hides keys by -inf before it scales, and would give NaN."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, 41, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    found = dilated_attention(*tensors, [4, 100], [1, 4], scale=scale, backend="sdpa")
    wanted = dilated_attention_reference(*wide, [4, 100], [1, 4], scale=scale)
    weight = torch.randn_like(wanted)
    found_grads = torch.autograd.grad((found * weight.to(dtype)).sum(), tensors)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), wide)
    tolerance = 1e-9 if dtype == torch.float64 else 0.15
    for one, other in zip((found, *found_grads), (wanted, *wanted_grads)):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5", torch.ones(2)], ids=str)
def test_what_is_no_scale_is_refused(scale):
    with pytest.raises(ValueError, match="`scale` must be"):
        dilated_attention(*query_key_value(), [8, 16], [1, 2], scale=scale)
