"""Time and memory of dilated attention, beside the kernels that it is made of and beside dense attention.

    python -m examples.benchmarks.benchmark_attention --mode kernel-ratio   # what the operator adds to its kernels
    python -m examples.benchmarks.benchmark_attention --mode patch-ratio    # the same of a patched model's layer
    python -m examples.benchmarks.benchmark_attention --mode length         # time per token, 16K to 1M tokens
    python -m examples.benchmarks.benchmark_attention --mode dense          # against dense attention; on a GPU to 1M

Each mode prints its result and writes NAME.json and NAME.png to --output-dir. What is compared is measured in turns in
one run, so that other load on the machine meets both sides. Letters: B batch, H heads, N tokens, D head dimension,
w segment length, r dilation rate.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from examples.measuring import in_turns, median, median_ratio, peak_memory, reset_peak_memory
from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.runs import geometric_patterns
from modeling_longnet import attention_kernels, dilated_attention
from modeling_longnet.dilation_plan import plan_blocks


aten = torch.ops.aten
Patterns = list[tuple[int, int]]

KERNEL_RATIO = {"length": 16384, "heads": 8, "width": 64, "patterns": [(2048, 1), (4096, 2), (8192, 4), (16384, 8)]}
# A layer of SmolLM2, patched as `patch_model` does it.
PATCH_RATIO = {"length": 8192, "heads": 9, "kv_heads": 3, "width": 64, "patterns": [(512, 1), (2048, 4), (8192, 16)]}
PATCHED = {"overlap": "once", "num_sink_tokens": 4, "local": "sliding"}
FIRST = 2048  # tokens of the first segment where the schedule grows with the text
LENGTHS = [16384, 65536, 262144, 1_000_000]
DENSE_LENGTHS = {"cpu": [2048, 4096, 8192, 16384], "cuda": [2**14, 2**15, 2**16, 2**17, 2**18, 2**19, 2**20]}


def inputs(length: int, heads: int, width: int, dtype: torch.dtype, device: str, grad: bool) -> list[torch.Tensor]:
    """Query, key and value [1, H, N, D]."""
    return [torch.randn(1, heads, length, width, dtype=dtype, device=device, requires_grad=grad) for _ in range(3)]


def operator(qkv: list[torch.Tensor], patterns: Patterns, backward: bool, **options) -> Callable[[], None]:
    """A call of the operator, with its gradients if `backward`."""
    segment_lengths, dilation_rates = (list(values) for values in zip(*patterns))

    def run():
        with torch.set_grad_enabled(backward):
            out = dilated_attention(*qkv, segment_lengths, dilation_rates, **options)
        if backward:
            torch.autograd.grad(out, qkv, torch.ones_like(out))

    return run


def gathered(x: torch.Tensor, w: int, r: int) -> torch.Tensor:
    """The rows that each head selects, side by side: [segments, H, w / r, D]."""
    heads = [x[0, j].view(-1, w, x.shape[-1])[:, j % r :: r] for j in range(x.shape[1])]
    return torch.stack(heads, 1).contiguous()


def bare_kernels(qkv: list[torch.Tensor], patterns: Patterns) -> Callable[[], None]:
    """Forward and backward of PyTorch's CPU flash kernel, pattern by pattern, on rows gathered beforehand."""
    rows = [[gathered(x.detach(), w, r) for x in qkv] for w, r in patterns]
    grads = [torch.ones_like(q) for q, _, _ in rows]

    def run():
        for (q, k, v), grad in zip(rows, grads):
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
            aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, True)

    return run


class KernelCalls:
    """Stands in for `torch.ops.aten` and keeps each call of a kernel, with copies of its tensors in one piece."""

    def __init__(self):
        self.calls: list[Callable[[], object]] = []

    def __getattr__(self, name: str) -> Callable:
        kernel = getattr(aten, name)

        def kept(x: object) -> object:
            return x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x

        def call(*args, **options):
            named = {key: kept(x) for key, x in options.items()}
            self.calls.append(partial(kernel, *map(kept, args), **named))
            return kernel(*args, **options)

        return call


def kernels_of(run: Callable[[], None], in_triangles: bool = False) -> list[Callable[[], object]]:
    """The kernel calls that a call of the operator makes, alone; `in_triangles`: those of its plan without bands."""
    module, kernels = importlib.import_module("modeling_longnet.dilated_attention"), KernelCalls()
    plan = (lambda kernel, *arguments, backward=False: plan_blocks(*arguments)) if in_triangles else module.plan_of
    with mock.patch.object(attention_kernels, "aten", kernels), mock.patch.object(module, "plan_of", plan):
        run()
    return kernels.calls


def operator_memory(length: int, heads: int, width: int, patterns: Patterns) -> dict[str, float]:
    """Peak of forward + backward above what is resident with the inputs made, in bytes, and as a multiple of theirs.

    Counted is all that the process holds: output, its gradient, the three gradients and every buffer. To be called in a
    fresh process: memory that an earlier computation left behind could be used again unseen.
    """
    small = inputs(64, heads, width, torch.float32, "cpu", True)
    operator(small, [(64, 1)], True)()  # loads code, starts threads
    qkv = inputs(length, heads, width, torch.float32, "cpu", True)
    size = sum(x.numel() * x.element_size() for x in qkv)
    before = reset_peak_memory()
    operator(qkv, patterns, True)()
    peak = peak_memory() - before
    return {"peak_bytes_above_inputs": peak, "bytes_of_qkv": size, "multiple_of_qkv": peak / size}


def kernel_ratio(args: argparse.Namespace) -> dict[str, Any]:
    """The operator's forward + backward against its bare kernels, and its peak memory."""
    setting = KERNEL_RATIO | ({"length": args.lengths[0]} if args.lengths else {})
    command = [sys.executable, "-m", "examples.benchmarks.benchmark_attention", "--peak-memory-of", json.dumps(setting)]
    memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    qkv = inputs(setting["length"], setting["heads"], setting["width"], torch.float32, "cpu", True)
    runs = {
        "operator": operator(qkv, setting["patterns"], True),
        "bare kernels": bare_kernels(qkv, setting["patterns"]),
    }
    times = in_turns(runs, args.repeats, "cpu")
    ratios = {key: median_ratio(*times.values(), key) for key in ("seconds", "cpu_seconds")}
    print(f"forward + backward, N={setting['length']}, H={setting['heads']}, D={setting['width']}, float32, CPU")
    for name, rows in times.items():
        print(f"  {name:<14}{median(rows):8.3f} s by the clock, {median(rows, 'cpu_seconds'):8.3f} s of CPU")
    print(f"  operator / bare kernels: {ratios['seconds']:.3f} by the clock, {ratios['cpu_seconds']:.3f} of CPU time")
    print(f"  peak memory above the inputs: {memory['multiple_of_qkv']:.2f} times q, k and v together")
    return {"setting": setting, "ratios": ratios, "memory": memory, "times": times}


def patch_ratio(args: argparse.Namespace) -> dict[str, Any]:
    """A patched layer's attention, tensors lying as a model gives them, against the kernels that it calls."""
    setting = PATCH_RATIO | ({"length": args.lengths[0]} if args.lengths else {})
    shape = [1, setting["length"], setting["heads"], setting["width"]]
    leaves = [torch.randn(shape[:2] + [heads, shape[3]]) for heads in (setting["heads"], *[setting["kv_heads"]] * 2)]
    qkv = [x.transpose(1, 2).requires_grad_() for x in leaves]
    rows = []
    for name, backward in (("forward", False), ("forward + backward", True)):
        run = operator(qkv, setting["patterns"], backward, **PATCHED)
        calls = {"bare kernels": kernels_of(run), "bare triangles": kernels_of(run, in_triangles=True)}
        runs = {"operator": run} | {side: lambda made=made: [call() for call in made] for side, made in calls.items()}
        times = in_turns(runs, args.repeats, "cpu")
        row = {"pass": name, "kernel calls": len(calls["bare kernels"])}
        row |= {side: median(times[side], "cpu_seconds") for side in runs}
        for side in ("bare kernels", "bare triangles"):
            row[f"operator / {side}"] = median_ratio(times["operator"], times[side], "cpu_seconds")
        print(", ".join(f"{key} {x:.3f}" if isinstance(x, float) else f"{key} {x}" for key, x in row.items()))
        rows.append(row | {"times": times})
    return {"setting": setting | PATCHED, "rows": rows}


def length_scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Forward time per token at growing length, the schedule growing with it."""
    device = args.device
    lengths = args.lengths or LENGTHS
    runs = {}
    for length in lengths:
        qkv = inputs(length, args.heads or 1, args.width or 32, getattr(torch, args.dtype), device, False)
        runs[length] = operator(qkv, geometric_patterns(length, FIRST), False)
    times = in_turns(runs, args.repeats, device)
    rows = []
    for length in lengths:
        nanoseconds = {key: 1e9 * median(times[length], key) / length for key in ("seconds", "cpu_seconds")}
        row = {"length": length, "patterns": geometric_patterns(length, FIRST)}
        rows.append(row | {"ns_per_token": nanoseconds["seconds"], "cpu_ns_per_token": nanoseconds["cpu_seconds"]})
        print(f"N={length:>8}: {median(times[length]):8.3f} s; ns per token {rows[-1]['ns_per_token']:8.0f} by the "
              f"clock, {rows[-1]['cpu_ns_per_token']:8.0f} of CPU time")  # fmt: skip
    per_token = {
        key: median_ratio(times[lengths[-1]], times[lengths[0]], key) * lengths[0] / lengths[-1]
        for key in ("seconds", "cpu_seconds")
    }
    print(f"time per token at {lengths[-1]} / at {lengths[0]}: {per_token['seconds']:.3f} by the clock, "
          f"{per_token['cpu_seconds']:.3f} of CPU time")  # fmt: skip
    return {"rows": rows, "ratio_of_time_per_token": per_token, "times": times}


def against_dense(args: argparse.Namespace) -> dict[str, Any]:
    """Forward, and forward + backward, against PyTorch's dense causal attention."""
    device, dtype = args.device, getattr(torch, args.dtype)
    heads, width = args.heads or 8, args.width or 64
    rows = []
    for length in args.lengths or DENSE_LENGTHS[device]:
        for backward in (False, True):
            qkv = inputs(length, heads, width, dtype, device, backward)

            def dense(qkv=qkv, backward=backward):
                with torch.set_grad_enabled(backward):
                    out = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
                if backward:
                    torch.autograd.grad(out, qkv, torch.ones_like(out))

            runs = {"dilated": operator(qkv, geometric_patterns(length, FIRST), backward), "dense": dense}
            times = in_turns(runs, args.repeats, device)
            row = {"length": length, "pass": "forward + backward" if backward else "forward"}
            row |= {name: median(times[name]) for name in times}
            row["dense / dilated"] = median_ratio(times["dense"], times["dilated"], "seconds")
            rows.append(row)
            print(f"N={length:>8} {row['pass']:<19} dilated {row['dilated']:9.4f} s, dense {row['dense']:9.4f} s, "
                  f"dense / dilated {row['dense / dilated']:.2f}")  # fmt: skip
    return {"heads": heads, "width": width, "dtype": args.dtype, "rows": rows}


def plot_kernel_ratio(axes, result):
    seconds = [[row["cpu_seconds"] for row in rows] for rows in result["times"].values()]
    axes.boxplot(seconds)
    axes.set_xticks([1, 2], list(result["times"]))
    axes.set(ylabel="CPU seconds, forward + backward", ylim=(0, 1.1 * max(map(max, seconds))))
    ratios, memory = result["ratios"], result["memory"]["multiple_of_qkv"]
    axes.set_title(f"operator / bare kernels: {ratios['cpu_seconds']:.2f} of CPU time, {ratios['seconds']:.2f} by the\n"
                   f"clock; peak memory {memory:.1f} times q, k and v", fontsize=9)  # fmt: skip


def plot_patch_ratio(axes, result):
    sides = ("operator", "bare kernels", "bare triangles")
    for i, side in enumerate(sides):
        axes.bar([place + 0.25 * i for place in range(2)], [row[side] for row in result["rows"]], 0.25, label=side)
    axes.legend(fontsize=8)
    axes.set_xticks([0.25, 1.25], [row["pass"] for row in result["rows"]])
    axes.set_ylabel("CPU seconds, one layer")
    axes.set_title("operator; its kernels alone; the kernels of windows in triangles\n" + ", ".join(
        f"{row['operator / bare kernels']:.2f} and {row['operator / bare triangles']:.2f}" for row in result["rows"]
    ) + " of their time", fontsize=9)  # fmt: skip


def plot_length(axes, result):
    lengths = [row["length"] for row in result["rows"]]
    axes.plot(lengths, [row["ns_per_token"] for row in result["rows"]], "o-", label="by the clock")
    axes.plot(lengths, [row["cpu_ns_per_token"] for row in result["rows"]], "s--", label="CPU time")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens", ylabel="ns per token, forward")
    axes.set_ylim(0, 1.4 * max(row["ns_per_token"] for row in result["rows"]))
    axes.legend(loc="upper right")


def plot_dense(axes, result):
    for name, colour in (("dilated", "C0"), ("dense", "C1")):
        for kind, line in (("forward", "o-"), ("forward + backward", "s--")):
            rows = [row for row in result["rows"] if row["pass"] == kind]
            axes.loglog([row["length"] for row in rows], [row[name] for row in rows], line, color=colour,
                        base=2, label=f"{name}, {kind}")  # fmt: skip
    axes.set(xlabel="tokens", ylabel="seconds")
    axes.legend()


MODES = {
    "kernel-ratio": (kernel_ratio, plot_kernel_ratio),
    "patch-ratio": (patch_ratio, plot_patch_ratio),
    "length": (length_scaling, plot_length),
    "dense": (against_dense, plot_dense),
}


def check_kernel_ratio(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what has no effect in these modes, which compare one setting on the CPU."""
    setting = KERNEL_RATIO if args.mode == "kernel-ratio" else PATCH_RATIO
    given = [name for name in ("heads", "width", "dtype") if getattr(args, name) is not None]
    if given:
        parser.error(f"--mode {args.mode} has its own {setting}: leave out --{given[0]}")
    longest = setting["patterns"][-1][0] if args.mode == "kernel-ratio" else 1
    if args.lengths and (len(args.lengths) > 1 or args.lengths[0] < 1 or args.lengths[0] % longest):
        parser.error(f"--mode {args.mode} takes one of --lengths, a multiple of {longest}, got {args.lengths}")
    args.device = "cpu"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=list(MODES), default="kernel-ratio")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="half precision needs a GPU to pay")
    parser.add_argument("--lengths", type=int, nargs="+", help="N of each row")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--width", type=int, help="D")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice if left out")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.peak_memory_of:
        print(json.dumps(operator_memory(**json.loads(args.peak_memory_of))))
        return {}
    if args.mode in ("kernel-ratio", "patch-ratio"):
        check_kernel_ratio(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    run, plot = MODES[args.mode]
    result = {"mode": args.mode, "provenance": provenance()} | run(args)
    name = f"attention_{args.mode.replace('-', '_')}_{args.device}"
    write_json(args.output_dir / f"{name}.json", result)
    figure, (axes,) = new_figure()
    plot(axes, result)
    save_figure(figure, args.output_dir / f"{name}.png", result["provenance"])
    print(f"{args.output_dir / name}.json and .png")
    return result


if __name__ == "__main__":
    main()
