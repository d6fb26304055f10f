"""All that a GPU has to tell about this package, in one command of at most ten minutes.

    python -m examples.benchmarks.gpu_suite                    # on a machine with a CUDA GPU
    python -m examples.benchmarks.gpu_suite --dry-run          # the same on a CPU at small sizes: no figure counts
    python -m examples.benchmarks.gpu_suite --resume           # goes on after an interruption

In this order: the Triton kernels compiled, side by side; correctness of every backend against float64; launches;
forward and forward + backward from 16K to 1M tokens beside dense attention (FlashAttention-2 and cuDNN), dense flash
of equal arithmetic (short texts in a batch) and a sliding window of equal arithmetic; decoding; a training step; tiles
for the Triton kernels. Writes gpu_suite.json after each part, gpu_suite.md (tables) and gpu_suite.png. What no longer
fits into --budget is left out and named.

Letters: B batch, H query heads, G key/value heads, N tokens, D head dimension, w segment length, r dilation rate.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from examples.benchmarks.triton_compile_check import compile_ahead
from examples.benchmarks.triton_tiles import TILES, choosing, fastest, measure_tiles
from examples.measuring import measure, median, peak_memory, reset_peak_memory
from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.runs import end_script, geometric_patterns
from modeling_longnet import DilatedCache, dilated_attention, dilated_attention_reference, patch_model
from modeling_longnet.attention_kernels import HAS_TRITON, why_not
from modeling_longnet.dilation_schedule import DilationSchedule
from modeling_longnet.transformers_compat import named_cache
from modeling_longnet.triton_attention import Tiles


aten = torch.ops.aten
BACKENDS = ("sdpa", "flash_attention_2", "triton")
PATCH = {"overlap": "once", "local": "sliding", "num_sink_tokens": 4}
# What is measured on a GPU, and in a dry run.
REAL = {
    "device": "cuda", "dtypes": ["bfloat16", "float16", "float32"], "correct_length": 700, "correct_first": 64,
    "widths": [64, 128], "heads": 16, "groups": 4, "lengths": [2**n for n in (14, 16, 18, 20)], "first": 2048,
    "launch_length": 8192, "repeats": 5, "slowest": 1.5, "contexts": [2048, 8192, 32768], "decoded": 32,
    "hidden": 768, "layers": 12, "vocabulary": 32000, "train_length": 16384, "patch": [[256, 1024, 4096], [1, 4, 16]],
}  # fmt: skip
DRY = REAL | {
    "device": "cpu", "dtypes": ["float32"], "correct_length": 70, "correct_first": 16, "widths": [16], "heads": 2,
    "groups": 1, "lengths": [64, 128], "first": 32, "launch_length": 64, "repeats": 1, "contexts": [48], "decoded": 2,
    "hidden": 32, "layers": 1, "vocabulary": 61, "train_length": 64, "patch": [[16, 32], [1, 2]],
}  # fmt: skip


def backends(query: torch.Tensor, sizes: dict) -> list[str]:
    """Those that can run tensors like `query`; a dry run leaves Triton's slow interpreter to the tests."""
    names = [name for name in BACKENDS if name != "triton" or sizes["device"] == "cuda"]
    return [name for name in names if not why_not(name, query, 0.0)]


def inputs(sizes: dict, length: int, width: int, dtype: torch.dtype, grad: bool = True) -> list[torch.Tensor]:
    """Query, key and value [1, H, N, D] as a model has them: heads side by side in a row."""
    return [
        torch.randn(1, length, heads, width, dtype=dtype, device=sizes["device"]).transpose(1, 2).requires_grad_(grad)
        for heads in (sizes["heads"], sizes["groups"], sizes["groups"])
    ]


def with_gradients(function: Callable, tensors: list[torch.Tensor], backward: bool) -> Callable[[], Any]:
    """A call of `function`, with its gradients if `backward`."""

    def run():
        with torch.set_grad_enabled(backward):
            out = function(*tensors)
        return torch.autograd.grad(out, tensors, torch.ones_like(out)) if backward else out

    return run


def compiling(sizes: dict) -> Iterator[dict]:
    """All Triton kernels of the parts below."""
    if sizes["device"] == "cpu" or not HAS_TRITON:
        return
    dtypes, (lengths, rates) = [getattr(torch, x) for x in sizes["dtypes"]], sizes["patch"]
    shape = {"heads": sizes["heads"], "groups": sizes["groups"]}
    patch = DilationSchedule(tuple(lengths), tuple(rates), **PATCH)
    heads = max(1, sizes["hidden"] // 64)
    settings = [{"schedule": patch, "dtype": dtypes[0], "width": 64, "heads": heads, "groups": heads}]
    for width in sizes["widths"]:
        one = shape | {"dtype": dtypes[0], "width": width}
        settings.append(one | {"schedule": patch})
        for length in (min(sizes["lengths"]), max(sizes["lengths"])):
            settings.append(one | {"schedule": _geometric(length, sizes["first"]), "length": length})
        shapes = {shape for candidates in TILES.values() for shape in candidates}
        tiled = one | {"schedule": _geometric(16384, 256), "length": 16384}
        settings += [tiled | {"tiles": Tiles(*shape)} for shape in shapes]
        for dtype in dtypes:
            for options in correctness_cases(sizes).values():
                options = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}
                packed = options.pop("document_ids", None) is not None
                case = {"schedule": DilationSchedule(**options), "packed": packed, "length": sizes["correct_length"]}
                settings.append(shape | case | {"dtype": dtype, "width": width})
    began = time.monotonic()
    launches, errors = compile_ahead(settings)
    yield {"launches": launches, "seconds": time.monotonic() - began, "errors": errors}


def _geometric(length: int, first: int) -> DilationSchedule:
    return DilationSchedule(*zip(*geometric_patterns(length, first, clip=True)))


def correctness_cases(sizes: dict) -> dict[str, dict]:
    first = sizes["correct_first"]
    lengths, rates = [first, 2 * first, 8 * first], [1, 2, 4]
    ids = torch.arange(sizes["correct_length"], device=sizes["device"]) // (3 * first + 5)
    return {
        "count": {"segment_lengths": lengths, "dilation_rates": rates},
        "contiguous offsets": {"segment_lengths": lengths, "dilation_rates": rates, "head_offsets": "contiguous"},
        "once, sinks, window": {"segment_lengths": lengths, "dilation_rates": rates} | PATCH,
        "once, not nested": {"segment_lengths": [first, 3 * first], "dilation_rates": [2, 3], "overlap": "once"},
        "bidirectional": {"segment_lengths": lengths, "dilation_rates": rates, "is_causal": False},
        "zero keys": {"segment_lengths": lengths, "dilation_rates": rates, "is_causal": False, "padding": "zeros"},
        "documents": {"segment_lengths": lengths, "dilation_rates": rates, "document_ids": ids[None]},
    }


def correctness(sizes: dict) -> Iterator[dict]:
    """Errors of out and gradients against float64, over those of the definition in the same precision."""
    for dtype_name in sizes["dtypes"]:
        for width in sizes["widths"]:
            dtype = getattr(torch, dtype_name)
            tensors = inputs(sizes, sizes["correct_length"], width, dtype)
            doubles = [x.detach().double().requires_grad_() for x in tensors]
            for name, options in correctness_cases(sizes).items():
                exact, plain = (_out_and_grads(dilated_attention_reference, x, options) for x in (doubles, tensors))
                naive = [_error(x, y) for x, y in zip(plain, exact)]
                # Half precisions: twice the definition's own error, and float32 within 1e-5 (docs say why).
                bounds = [1e-5 if dtype == torch.float32 else max(2 * e, 1e-4) for e in naive]
                for backend in backends(tensors[0], sizes):
                    row = {"case": name, "backend": backend, "dtype": dtype_name, "D": width}
                    try:
                        got = _out_and_grads(dilated_attention, tensors, options | {"backend": backend})
                        errors = [_error(x, y) for x, y in zip(got, exact)]
                        passed = all(e <= bound for e, bound in zip(errors, bounds))
                        yield row | {"errors": errors, "naive": naive, "passed": passed}
                    except Exception as error:  # a kernel that does not run leaves the others to be measured
                        yield row | {"errors": f"{type(error).__name__}: {error}"[:200], "passed": False}


def _out_and_grads(function: Callable, tensors: list[torch.Tensor], options: dict) -> list[torch.Tensor]:
    out = function(*tensors, **options)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights)]


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def launches(sizes: dict) -> Iterator[dict]:
    """Kernels that a forward and a backward of the default patch start; on a CPU, operators that PyTorch calls."""
    on_gpu = sizes["device"] == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    lengths, rates = sizes["patch"]
    tensors = inputs(sizes, sizes["launch_length"], sizes["widths"][0], getattr(torch, sizes["dtypes"][0]))
    for backend in backends(tensors[0], sizes):
        counts = []
        for backward in (False, True):
            run = with_gradients(
                lambda q, k, v, name=backend: dilated_attention(q, k, v, lengths, rates, **PATCH, backend=name),
                tensors, backward,
            )  # fmt: skip
            run()
            with profile(activities=activities, acc_events=True) as found:
                run()
            counts.append(sum(e.device_type == DeviceType.CUDA or not on_gpu for e in found.events()))
        yield {"backend": backend, "tokens": sizes["launch_length"], "forward": counts[0], "both": counts[1]}


def scores_per_query(patterns: list[tuple[int, int]]) -> float:
    """Keys that a query sees on average, causally, far from the start: 1 / r of the queries see w / 2r keys."""
    return sum(w / r / r / 2 for w, r in patterns)


def dilated(patterns: list[tuple[int, int]], backend: str) -> Callable:
    segment_lengths, rates = (list(x) for x in zip(*patterns))
    return lambda q, k, v: dilated_attention(q, k, v, segment_lengths, rates, backend=backend)


def sides_of(sizes: dict, length: int, width: int, dtype: torch.dtype) -> dict[str, tuple[Callable, list, float]]:
    """What is compared at a length: (function, its inputs, scores a query and head)."""
    patterns = geometric_patterns(length, sizes["first"], clip=True)
    scores = scores_per_query(patterns)
    tensors = inputs(sizes, length, width, dtype)
    sides = {f"dilated, {x}": (dilated(patterns, x), tensors, scores) for x in backends(tensors[0], sizes)}

    def flash(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    equal = min(int(2 * scores), length)  # a causal text of this length has that many scores a query
    texts = [
        x.detach()[:, :, : length // equal * equal].unflatten(2, (-1, equal)).transpose(1, 2).flatten(0, 1).contiguous()
        for x in tensors
    ]
    sides["dense, equal arithmetic"] = flash, [x.requires_grad_() for x in texts], equal / 2
    sides["dense"] = flash, tensors, length / 2
    if sizes["device"] == "cuda":
        sides["dense, cuDNN"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(flash), tensors, length / 2
    window = min(int(scores), length)
    sides["sliding window"] = _window(sizes, window), tensors, window
    return sides


def _window(sizes: dict, window: int) -> Callable:
    """A causal window of `window` keys: PyTorch's FlashAttention-2 on a GPU, and our own in a dry run."""
    if sizes["device"] == "cpu":
        return lambda q, k, v: dilated_attention(q, k, v, [2 * window], [1], local="sliding")

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        settings = {"window_size_left": window - 1, "window_size_right": 0}
        out, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=q.shape[-1] ** -0.5, **settings
        )
        return out.transpose(1, 2)

    return attend


def lengths(sizes: dict) -> Iterator[dict]:
    """Seconds, TFLOP/s of useful work, peak memory by length; nothing longer than what was too slow or did not fit."""
    dtype, dropped = getattr(torch, sizes["dtypes"][0]), {}
    for width in sizes["widths"]:
        for length in sizes["lengths"]:
            for backward in (False, True):
                gone = dropped.setdefault((width, backward), {})
                sides = sides_of(sizes, length, width, dtype)
                runs, row = {}, {"D": width, "tokens": length, "pass": "both" if backward else "forward", "sides": {}}
                for name, (function, tensors, scores) in sides.items():
                    if name in gone:
                        row["sides"][name] = {"left_out": gone[name]}
                        continue
                    flop = 4 * width * scores * length * sizes["heads"] * (3.5 if backward else 1)
                    runs[name] = with_gradients(function, tensors, backward), flop
                _take_turns(sizes, runs, row["sides"], gone)
                yield row


def _take_turns(sizes: dict, runs: dict, results: dict, gone: dict[str, str]) -> None:
    """Measures `runs` (name: function, FLOP) one after the other, `repeats` times; `gone` takes what was too much."""
    times = {}
    for name, (run, _) in list(runs.items()):
        try:
            run()
            before = reset_peak_memory(sizes["device"])
            first = measure(run, sizes["device"])
            results[name] = {"peak_gib": (peak_memory(sizes["device"]) - before) / 2**30}
            times[name] = [first]
            is_quadratic = name in ("dense", "dense, cuDNN")
            if first["seconds"] > sizes["slowest"] / (8 if is_quadratic else 2):
                gone[name] = f"{first['seconds']:.1f} s at a shorter length"
        except Exception as error:  # one side that does not run leaves the others to be measured
            told = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{error}".splitlines()[0][:100]
            results[name] = {"left_out": told}
            gone[name] = f"{told}, at a shorter length"
            torch.cuda.empty_cache()
    for _ in range(sizes["repeats"] - 1):
        for name, found in times.items():
            if sum(x["seconds"] for x in found) < sizes["slowest"]:
                found.append(measure(runs[name][0], sizes["device"]))
    for name, found in times.items():
        seconds = median(found)
        results[name] |= {"seconds": seconds, "turns": len(found), "tflops": runs[name][1] / seconds / 1e12}


def small_llama(sizes: dict, backend: str | None, dense: bool = False) -> LlamaForCausalLM:
    """A random Llama of a GPT-2's size, patched with the default schedule unless `dense`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], intermediate_size=3 * sizes["hidden"],
        num_hidden_layers=sizes["layers"], num_attention_heads=max(1, sizes["hidden"] // 64),
        num_key_value_heads=max(1, sizes["hidden"] // 64), max_position_embeddings=2**20, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(sizes["device"], getattr(torch, sizes["dtypes"][0]))
    return model if dense else patch_model(model, *sizes["patch"], backend=backend, **PATCH)


@torch.no_grad()
def decoding(sizes: dict) -> Iterator[dict]:
    """Seconds a token behind a text: dense, and patched with its bounded cache."""
    dense, patched = small_llama(sizes, None, dense=True).eval(), small_llama(sizes, None).eval()
    for context in sizes["contexts"]:
        row = {"tokens": context, "sides": {}}
        # PyTorch's first choice on Hopper, cuDNN, plans anew for each length: dense is measured without it too.
        for name, model, cache, cudnn in (
            ("dense, dynamic cache", dense, DynamicCache(config=dense.config), True),
            ("dense, dynamic cache, no cuDNN", dense, DynamicCache(config=dense.config), False),
            ("patched, bounded cache", patched, DilatedCache(patched.config), True),
        ):
            text = torch.randint(sizes["vocabulary"], (1, context), device=sizes["device"])
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            model(text, **named_cache(cache), use_cache=True, logits_to_keep=1)
            times = [
                measure(lambda m=model, c=cache, t=text: m(t[:, :1], **named_cache(c), use_cache=True), sizes["device"])
                for _ in range(sizes["decoded"])
            ]
            row["sides"][name] = {"seconds": median(times[sizes["decoded"] // 4 :])}
            torch.backends.cuda.enable_cudnn_sdp(True)
        yield row


def training(sizes: dict) -> Iterator[dict]:
    """One training step (forward, backward, AdamW), after one that does not count: seconds and peak memory."""
    query = torch.empty(0, 1, 1, 64, dtype=getattr(torch, sizes["dtypes"][0]), device=sizes["device"])
    for backend in (*backends(query, sizes), None):
        model = small_llama(sizes, backend, dense=backend is None).train()
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        text = torch.randint(sizes["vocabulary"], (1, sizes["train_length"]), device=sizes["device"])

        def step(model=model, optimizer=optimizer, text=text):
            model(text, labels=text).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        before = reset_peak_memory(sizes["device"])
        times = [measure(step, sizes["device"]) for _ in range(min(3, sizes["repeats"]))]
        peak = (peak_memory(sizes["device"]) - before) / 2**30
        name = "dense" if backend is None else f"dilated, {backend}"
        yield {"side": name, "tokens": sizes["train_length"], "seconds": median(times), "peak_gib": peak}


def tiles(sizes: dict) -> Iterator[dict]:
    """Seconds of each Triton kernel with other tiles, for the table that the backend chooses by."""
    for width in sizes["widths"] if sizes["device"] == "cuda" and HAS_TRITON else ():
        tensors = inputs(sizes, 16384, width, getattr(torch, sizes["dtypes"][0]))
        for first in (256, 2048):
            patterns = geometric_patterns(16384, first, clip=True)
            run = with_gradients(dilated(patterns, "triton"), tensors, True)
            yield from ({"w / r": first} | row for row in measure_tiles(run, width, sizes["repeats"]))


PARTS = {
    "compiling": compiling, "correctness": correctness, "launches": launches, "lengths": lengths,
    "decoding": decoding, "training": training, "tiles": tiles,
}  # fmt: skip


def lines_of(part: str, row: dict) -> Iterator[list[str]]:
    """A row of the record as rows of its table."""
    if "sides" not in row:
        yield [", ".join(f"{x:.1e}" for x in v) if isinstance(v, list) and v and isinstance(v[0], float)
               else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]  # fmt: skip
        return
    for side, found in row["sides"].items():
        setting = [str(row[key]) for key in ("D", "tokens", "pass") if key in row]
        values = found.get("left_out") or ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        yield [*setting, side, values]


def write_table(path: Path, record: dict) -> None:
    origin = record["provenance"]
    text = [f"{origin['hardware']}, commit {origin['commit']}: `{origin['command']}`"]
    for part, rows in record["parts"].items():
        text += ["", f"## {part}", ""]
        lines = [line for row in rows for line in lines_of(part, row)]
        for index, line in enumerate(lines):
            text.append(f"| {' | '.join(line)} |")
            if index == 0:
                text.append("|" + " --- |" * len(line))
    text += ["", *(f"Left out: {x}" for x in record["left_out"])]
    path.write_text("\n".join(text) + "\n")


def draw(path: Path, record: dict) -> None:
    """Nanoseconds a token against the length, a panel for each head dimension and pass."""
    rows = record["parts"].get("lengths", [])
    panels = sorted({(row["D"], row["pass"]) for row in rows}, key=str)
    figure, all_axes = new_figure(max(1, len(panels)))
    for axes, (width, kind) in zip(all_axes, panels):
        chosen = [row for row in rows if (row["D"], row["pass"]) == (width, kind)]
        for side in chosen[0]["sides"]:
            points = [(r["tokens"], r["sides"][side].get("seconds")) for r in chosen]
            points = [(n, 1e9 * s / n) for n, s in points if s]
            axes.loglog(*zip(*points), "o-", label=side) if points else None
        axes.set(xlabel="tokens", ylabel="ns a token", title=f"D = {width}, {kind}")
        axes.legend(fontsize=7)
    save_figure(figure, path, record["provenance"])


def run(args: argparse.Namespace, sizes: dict) -> dict:
    began, path = time.monotonic(), args.output_dir / "gpu_suite.json"
    record = {"provenance": provenance(), "dry_run": args.dry_run, "sizes": sizes, "parts": {}, "left_out": []}
    if args.resume and path.is_file():
        old = json.loads(path.read_text())
        if old["provenance"]["commit"] != record["provenance"]["commit"] or old["dry_run"] != args.dry_run:
            raise ValueError(f"`resume` goes on with the run as it was, and {path} is not of this commit and mode.")
        record["parts"] = {part: rows for part, rows in old["parts"].items() if part not in old.get("unfinished", ())}
    for part in [name for name in args.parts if name not in record["parts"]]:
        rows = record["parts"][part] = []
        record["unfinished"] = [part]
        best = fastest(record["parts"].get("tiles", [])) if args.fastest_tiles else {}
        record["tiles"] = {f"{kernel}, D = {width}": list(vars(x).values()) for (kernel, width), x in best.items()}
        with choosing(best):
            for row in PARTS[part](sizes):
                rows.append(row)
                for line in lines_of(part, row):
                    print(f"{part}: {'  '.join(line)}", flush=True)
                if time.monotonic() - began > args.budget:
                    told = f"{part} after {len(rows)} rows: the budget of {args.budget} s was spent"
                    record["left_out"].append(told)
                    break
        record["unfinished"] = []
        write_json(path, record)
    write_table(args.output_dir / "gpu_suite.md", record)
    draw(args.output_dir / "gpu_suite.png", record)
    print(f"{path}, .md and .png")
    return record


def main(arguments: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=540, help="seconds after which the rest is left out")
    parser.add_argument("--fastest-tiles", action="store_true", help="later parts take those that part `tiles` found")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at small sizes")
    parser.add_argument("--resume", action="store_true", help="keep the parts that an interrupted run finished")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu_suite"))
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("`gpu_suite` wants a CUDA GPU, got none: --dry-run tries the same at small sizes on a CPU.")
    record = run(args, DRY if args.dry_run else REAL)
    wrong = [row for row in record["parts"].get("correctness", []) if not row["passed"]]
    if wrong:
        raise ValueError(f"{len(wrong)} results are wrong; the first: {wrong[0]}")
    return record


if __name__ == "__main__":
    end_script(main, "the same command with --resume goes on")
