"""The Triton kernels against the float64 definition: in Triton's interpreter, or on the GPU where there is one.

Shapes are small and tiles smaller (16 rows): the interpreter runs one program after the other, operation by operation.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from operator_cases import Case
from packaging.version import Version
from tiny_models import tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmarks.triton_compile_check import record_launches
from modeling_longnet import (
    DilatedCache,
    DilationSchedule,
    LongNetForCausalLM,
    attention_kernels,
    dilated_attention,
    patch_model,
    triton_attention,
)
from modeling_longnet.dilated_attention_reference import dilated_attention_reference
from modeling_longnet.dilation_schedule import Heads
from modeling_longnet.transformers_compat import CACHE, named_cache
from modeling_longnet.triton_attention import Tiles, plan_launches


ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def why_no_interpreter() -> str | None:
    if not attention_kernels.HAS_TRITON:
        return "Triton is not installed (pip install triton; Linux)"
    if DEVICE == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET is not 1"
    if Version(version("triton")) < Version("3.9") and Version(np.__version__) >= Version("2.4"):
        return f"the interpreter of Triton {version('triton')} cannot run loops with NumPy {np.__version__}"
    return None


REASON = why_no_interpreter()
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
NESTED = {"segment_lengths": [16, 32, 96], "dilation_rates": [1, 2, 6]}
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 41 + [-1] * 4 + [2] * 8, [-1] * 6 + [3] * 30 + [4] * 20])


def case(segment_lengths, dilation_rates, length=56, heads=3, groups=None, queries=None, width=16, batch=1, **options):
    groups, queries = groups or heads, queries or length
    return Case(segment_lengths, dilation_rates, batch, heads, groups, length, queries, width, options)


# Name: (case, rows of queries and of keys in a tile). Every option, alone and with those that it meets in a kernel.
CASES = {
    "count, modulo": (case([16, 40], [1, 3], length=44), (16, 32)),
    "count, contiguous, a batch": (case([20, 50], [1, 3], length=44, heads=3, groups=1, batch=2,
                                        head_offsets="contiguous"), (32, 16)),
    "count, groups": (case([16, 64], [1, 2], heads=4, groups=2), (16, 16)),
    "count, contiguous groups": (case([20, 64], [1, 3], heads=4, groups=2, head_offsets="contiguous"), (16, 16)),
    "count, nothing selects some queries": (case([20, 64], [2, 4], heads=2), (16, 16)),
    "count, rates that divide nothing": (case([17, 41], [2, 5], heads=2, num_sink_tokens=3), (16, 16)),
    "bidirectional": (case([16, 64], [1, 4], is_causal=False, num_sink_tokens=2, heads=2), (16, 16)),
    "bidirectional, zero keys": (case([20, 64], [1, 4], is_causal=False, padding="zeros", heads=2), (16, 16)),
    "bidirectional, once": (case([16, 64], [1, 4], is_causal=False, overlap="once", heads=2), (16, 16)),
    "once, nested, sinks": (case(**NESTED, length=80, heads=2, overlap="once", num_sink_tokens=4), (16, 16)),
    "once, nested, wide tiles": (case(**NESTED, heads=2, groups=1, overlap="once"), (32, 32)),
    "once, not nested": (case([18, 40], [2, 3], overlap="once", num_sink_tokens=5, heads=2), (16, 16)),
    "once, contiguous": (case([16, 64], [1, 3], overlap="once", heads=4, groups=2, head_offsets="contiguous"),
                         (16, 16)),
    "once, contiguous, two earlier": (case([14, 28, 56], [1, 2, 4], overlap="once", head_offsets="contiguous",
                                           heads=2), (16, 16)),
    "sliding, count": (case([24, 64], [1, 4], local="sliding", heads=2), (16, 16)),
    "sliding, once, sinks": (case([24, 48, 96], [1, 2, 4], length=60, heads=2, groups=1, local="sliding",
                                  overlap="once", num_sink_tokens=4), (16, 16)),
    "sliding, not nested": (case([24, 30, 64], [1, 2, 3], local="sliding", overlap="once", heads=2), (16, 32)),
    "chunk over past keys": (case([16, 32, 64], [1, 2, 4], queries=13, heads=4, groups=2, overlap="once",
                                  num_sink_tokens=3), (16, 16)),
    "a query, its past and its future": (case([16, 64], [1, 4], queries=1, query_offset=37, heads=4), (16, 16)),
    "sliding chunk": (case([16, 64], [1, 4], queries=20, query_offset=30, heads=2, local="sliding"), (16, 16)),
    "documents": (case([16, 48], [1, 3], batch=2, heads=2, document_ids=DOCUMENTS, num_sink_tokens=2), (16, 16)),
    "documents, sliding, chunk": (case([16, 32], [1, 2], batch=2, heads=2, groups=1, queries=30, query_offset=20,
                                       document_ids=DOCUMENTS, local="sliding", overlap="once"), (16, 16)),
    "documents, not all selected": (case([16, 48], [2, 3], heads=2, document_ids=DOCUMENTS[:1]), (16, 16)),
    "a slice of the heads": (case([16, 64], [1, 5], heads=4, groups=2, head_index_offset=3, total_num_heads=9),
                             (16, 16)),
    "a slice of contiguous heads": (case([16, 64], [1, 5], heads=4, groups=2, head_index_offset=3, total_num_heads=9,
                                         head_offsets="contiguous", overlap="once"), (16, 16)),
    "heads of 20, a scale": (case([16, 64], [1, 4], width=20, heads=2, scale=0.7), (16, 16)),
    "heads of 256": (case([32], [1], width=256, heads=1, length=40), (16, 16)),
}  # fmt: skip


@pytest.fixture
def tiles_of(monkeypatch):
    """Sets the tiles of all kernels."""
    return lambda rows, columns: monkeypatch.setattr(
        triton_attention, "choose_tiles", lambda *_: Tiles(rows, columns, 4, 1)
    )


def evaluate(function, one, tensors, grad, **options):
    """(out, lse, dq, dk, dv), the gradient through lse included."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    given = {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in one.options.items()}
    out, lse = function(*leaves, one.segment_lengths, one.dilation_rates, return_lse=True, **given, **options)
    grads = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), *grads


def check(one, tensors, grad, tolerance=1e-5, backend="triton"):
    """The kernels against the definition, the first in the dtype of the tensors and the second in float64."""
    wanted = evaluate(dilated_attention_reference, one, [x.double() for x in tensors], grad.double())
    got = evaluate(dilated_attention, one, tensors, grad, backend=backend)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        assert x.shape == y.shape and torch.equal(torch.isinf(x), torch.isinf(y)), name
        finite = ~torch.isinf(y)
        error = (x.double() - y)[finite].abs().max() / max(1.0, y[finite].abs().max())
        assert error <= tolerance, (name, error.item())


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_equals_the_float64_reference(name, tiles_of):
    one, tiles = CASES[name]
    tiles_of(*tiles)
    *tensors, grad = one.tensors(torch.float32, DEVICE)
    check(one, tensors, grad)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_the_naive_path(dtype, tiles_of):
    tiles_of(16, 16)
    ours, naive = [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    for name in ("count, modulo", "sliding, once, sinks"):
        one, _ = CASES[name]
        *tensors, grad = one.tensors(dtype, DEVICE)
        wanted = evaluate(dilated_attention_reference, one, [x.double() for x in tensors], grad.double())
        runs = ((ours, dilated_attention, {"backend": "triton"}), (naive, dilated_attention_reference, {}))
        for total, function, options in runs:
            for i, (x, y) in enumerate(zip(evaluate(function, one, tensors, grad, **options), wanted)):
                total[i] += (x.double() - y).nan_to_num(posinf=0, neginf=0).abs().max().cpu()
    assert (ours <= 2 * naive).all(), (ours, naive)


@needs_triton
def test_gradient_through_the_log_sum_exp(tiles_of):
    tiles_of(16, 16)
    one, results = case([16, 32], [1, 2], length=40, heads=2), []
    *tensors, _ = one.tensors(torch.float32, DEVICE)
    for backend in ("triton", "eager"):
        leaves = [x.detach().requires_grad_() for x in tensors]
        _, lse = dilated_attention(*leaves, [16, 32], [1, 2], return_lse=True, backend=backend)
        results.append(torch.autograd.grad(lse.sin().sum(), leaves[:2]))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def far_apart(tensors: list[torch.Tensor], head_stride: int, token_stride: int) -> list[torch.Tensor]:
    """The tensors [1, H, N, D], strided, in one storage of billions of elements: untouched pages cost nothing.

    The first 2**31 elements are room for addresses that went wrong: they find nothing there, but no fault either.
    """
    _, heads, tokens, width = tensors[0].shape
    size = 2**31 + (heads - 1) * head_stride + (tokens - 1) * token_stride + 4096
    storage = torch.from_numpy(np.empty(size, dtype=np.float16))
    strides = (0, head_stride, token_stride, 1)
    places = range(2**31, 2**31 + 4096, 1024)
    return [storage.as_strided(x.shape, strides, place).copy_(x) for x, place in zip(tensors, places)]


def check_far_addresses(backend="triton"):
    """Heads, and then rows of a tile, that lie more than 2**31 elements from each other."""
    for one, strides in (
        (case([16, 32], [1, 2], length=20, heads=3), (2**30 + 64, 16)),
        (case([32], [1], length=12, heads=1), (16, 2**28 + 16)),
    ):
        *tensors, grad = far_apart(one.tensors(torch.float16), *strides)
        check(one, tensors, grad, 3e-3, backend)


only_interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="for the interpreter: on a GPU it would need the memory")


@only_interpreted
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton), "sdpa", "eager"])
def test_addresses_beyond_int32(backend, tiles_of):
    tiles_of(16, 16)
    check_far_addresses(backend)


# File, what stands there, what is planted in its place, and the case that must fail then (None: the far addresses).
PLANTED = {
    "a wrong offset": ("triton_kernels", "return head % rate", "return (head + 1) % rate", "count, modulo"),
    "a dropped diagonal": ("triton_kernels", "limit = p + 1\n        if INNER", "limit = p\n        if INNER",
                           "count, modulo"),
    "a dropped diagonal of the keys": ("triton_key_kernels", "p = k\n", "p = k + 1\n", "count, modulo"),
    "a window too long": ("triton_kernels", "p >= dense, p - window + 1, 0)\n\n", "p >= dense, p - window, 0)\n\n",
                          "sliding, count"),
    "sinks twice": ("triton_kernels", "begin = rows_below(sinks - origin, rate)", "begin = origin * 0",
                    "bidirectional"),
    "an int32 base": ("triton_kernels", "h = (pid // entries).to(tl.int64)", "h = pid // entries", None),
    "int32 rows": ("triton_kernels", "offset = row.to(tl.int64)", "offset = row", None),
}  # fmt: skip


def plant(monkeypatch, folder: Path, file: str, old: str, new: str) -> None:
    """The kernels anew, with `new` where `old` stands in one of their files."""
    for name in ("triton_kernels", "triton_key_kernels"):
        text = (ROOT / "modeling_longnet" / f"{name}.py").read_text()
        if name == file:
            assert old in text
            text = text.replace(old, new)
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"modeling_longnet.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)


@needs_triton
@only_interpreted
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_caught(error, tiles_of, monkeypatch, tmp_path):
    file, old, new, name = PLANTED[error]
    plant(monkeypatch, tmp_path, file, old, new)
    one, tiles = CASES[name] if name else (None, (16, 16))
    tiles_of(*tiles)
    *tensors, grad = one.tensors(torch.float32) if one else [None]
    with pytest.raises(AssertionError):
        check(one, tensors, grad) if one else check_far_addresses()


@needs_triton
def test_a_patched_model_reads_learns_and_decodes_as_with_another_backend(tiles_of):
    tiles_of(16, 16)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).to(DEVICE), torch.randint(61, (2, 40), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    results = []
    for backend in ("triton", None):
        patched = patch_model(copy.deepcopy(model), [16, 32], [1, 2], backend=backend)
        loss = patched(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            cache = patched(ids[:, :-1], attention_mask=mask[:, :-1])[CACHE]
            step = patched(ids[:, -1:], attention_mask=mask, **named_cache(cache))
        gradients = [p.grad for p in patched.parameters()]
        results.append([loss.detach(), step.logits, *gradients])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@needs_triton
def test_one_launch_per_pattern_and_none_that_adds_nothing():
    """What is launched, counted on tensors without memory: the forward of the default patch, in 3 launches a layer."""
    schedule = DilationSchedule((256, 1024, 4096), (1, 4, 16), overlap="once", num_sink_tokens=4, local="sliding")
    names = [kernel.__name__ for kernel, _, _ in record_launches(schedule, torch.bfloat16, 64)]
    assert names.count("forward_kernel") == 3 and names.count("query_grad_kernel") == 3
    assert names.count("key_grad_kernel") == 3 and len(names) == 12  # and row sums, sinks, the sum of their parts
    short = [kernel.__name__ for kernel, _, _ in record_launches(schedule, torch.bfloat16, 64, length=256)]
    assert short.count("forward_kernel") == 1
    launches = plan_launches(schedule, Heads(8, 8, 0, 8), 8192)
    assert [(launch.r, launch.inner) for launch in launches] == [(16, 1024), (4, 0), (1, 0)]
    assert all(launch.after_window for launch in launches[:2]) and launches[2].local


def test_rows_lie_where_the_definition_has_queries_and_keys():
    """Each position of a head's pattern lies in one tile: with a table for documents, and without."""
    query, key = torch.empty(2, 3, 40, 16), torch.empty(2, 3, 56, 16)
    rows = triton_attention.Rows(query, key, DOCUMENTS, 10)
    for of_keys in (False, True):
        given = rows.of(16, 3, 2, of_keys)
        table = given["TABLE"]
        assert given["PACKED"] and given["entries"] == len(table) == len(table.unique(dim=0))
        for row, start, length, segment, _ in table.tolist():
            assert (DOCUMENTS[row, start : start + length] == DOCUMENTS[row, start]).all()
            assert segment * 16 < length and DOCUMENTS[row, start] >= 0
        tiles = {}
        for row, start, _, segment, tile in table.tolist():
            tiles.setdefault((row, start, segment), []).append(tile)
        for (row, start, segment), found in tiles.items():
            length = next(line[2] for line in table.tolist() if line[:2] == [row, start])
            begin, end = segment * 16, min((segment + 1) * 16, length)
            if not of_keys:
                begin, end = max(begin, 10 - start), min(end, 50 - start)
            assert sorted(found) == list(range((end - begin + 5) // 6))
    assert triton_attention.Rows(query, key, None, 16).of(16, 3, 2, False)["segments"] == 3


def query_key_value(dtype=torch.float32, width=16):
    return [torch.randn(1, 2, 20, width, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32"),
        ({"width": 8}, "from 16 to 256"),
        ({"width": 300}, "from 16 to 256"),
        ({"dropout": 0.5}, "dropout=0.5"),
        ({"memory": {"block_size": 4, "top_k": 2}, "overlap": "once", "local": "sliding"}, "no memory"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_refused_by_name(change, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(attention_kernels, "HAS_TRITON", True)
    tensors = query_key_value(change.pop("dtype", torch.float32), change.pop("width", 16))
    with pytest.raises(ValueError, match=f"triton.*{message}"):
        dilated_attention(*tensors, [8, 16], [1, 2], backend="triton", **change)


def test_refused_without_triton_and_without_a_gpu(monkeypatch):
    for has_triton, interpret, message in ((False, "1", "not installed"), (True, "0", "runs on CUDA")):
        monkeypatch.setattr(attention_kernels, "HAS_TRITON", has_triton)
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        with pytest.raises(ValueError, match=message):
            dilated_attention(*query_key_value(), [8, 16], [1, 2], backend="triton")


@needs_triton
def test_a_bounded_cache_takes_the_text_but_no_further_chunk(tiles_of):
    tiles_of(16, 16)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config), [8, 16], [1, 2], backend="triton").eval().to(DEVICE)
    ids, cache = torch.randint(61, (1, 12), device=DEVICE), DilatedCache(model.config)
    with torch.no_grad():
        model(ids, **named_cache(cache))
        assert model(ids[:, :1], **named_cache(cache)).logits.isfinite().all()
        with pytest.raises(ValueError, match="no chunk behind a bounded cache"):
            model(ids, **named_cache(cache))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_never_chosen_unless_named(device_type, monkeypatch):
    """Until a GPU has run it: not even where it could run and nothing else can."""
    monkeypatch.setattr(attention_kernels, "HAS_TRITON", True)
    monkeypatch.setattr(attention_kernels, "HAS_FLASH_ATTN", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            query = torch.empty(1, 2, 20, 16, dtype=dtype, device=device_type)
            assert attention_kernels.choose_backend(None, query, 0.0) in ("sdpa", "eager")


def test_chosen_where_measurements_say_so_and_nowhere_else(monkeypatch):
    """By default on a GPU that was measured, for several patterns and many queries in half precision."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    schedule, heads = DilationSchedule((256, 1024), (1, 4), overlap="once"), Heads(2, 2, 0, 2)

    def chosen(queries=2048, dtype=torch.bfloat16, device="cuda", length=2048):
        query, key = (torch.empty(1, 2, n, 64, dtype=dtype, device=device) for n in (queries, length))
        return triton_attention.is_faster(query, key, schedule, heads)

    with FakeTensorMode():
        assert chosen() and chosen(dtype=torch.float16) and chosen(queries=128)
        assert not chosen(dtype=torch.float32) and not chosen(queries=1) and not chosen(device="cpu")
        assert not chosen(queries=256, length=256)  # one pattern sees all: dense, which PyTorch's kernels do faster
        with monkeypatch.context() as patch:  # AMD's numbers mean other GPUs
            patch.setattr(torch.version, "hip", "6.4")
            assert not chosen()
        capability[0] = (8, 0)
        assert not chosen()


@needs_triton
def test_a_longnet_takes_it_by_name(tiles_of, tmp_path):
    tiles_of(16, 16)
    torch.manual_seed(0)
    model = LongNetForCausalLM(tiny_config(hidden_size=64, initializer_range=0.2)).to(DEVICE)
    ids, grads = torch.randint(61, (1, 40), device=DEVICE), []
    model.save_pretrained(tmp_path)
    for name in ("sdpa", "triton"):
        model = LongNetForCausalLM.from_pretrained(tmp_path, attn_implementation=name).to(DEVICE)
        assert model.config._attn_implementation == name
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@needs_triton
def test_compiles_for_a_gpu_that_is_not_there(tmp_path):
    """Hopper's kernels of one schedule, by the script; what the interpreter lets pass, the compiler may not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-m", "examples.benchmarks.triton_compile_check", "--arch", "90",
               "--head-dim", "64", "--schedule", "once, sinks, window", "--output",
               str(tmp_path / "kernels.json")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    main = {"forward_kernel", "query_grad_kernel", "key_grad_kernel"}
    assert {row["kernel"] for row in rows} == main | {"row_sums_kernel", "sink_grad_kernel", "add_sinks_kernel"}
    assert all(row["wgmma"] for row in rows if row["kernel"] in main)
    # The gradients of keys spill with the tiles that an H100 found fastest all the same.
    assert not any(row["spilled_bytes"] for row in rows if row["kernel"] != "key_grad_kernel")
