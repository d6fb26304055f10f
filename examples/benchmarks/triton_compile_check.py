"""Compiles the Triton kernels for GPUs that are not there: registers, spills, tensor-core instructions of each.

    python -m examples.benchmarks.triton_compile_check                  # sm_90 and sm_80, all options
    python -m examples.benchmarks.triton_compile_check --arch 90 --head-dim 64 --dtype bfloat16

The operator runs on tensors without memory; each launch it asks for is compiled, with the very arguments, instead of
started. Triton's package brings the compiler (ptxas) and the disassembler along. Ends with an error if a kernel does
not compile, and prints what spills registers to memory; `--strict` makes that an error too.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.reporting import provenance, write_json
from modeling_longnet import triton_attention
from modeling_longnet.attention_kernels import HAS_TRITON
from modeling_longnet.dilation_schedule import DilationSchedule, Heads


TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
SCHEDULES = {
    "count": DilationSchedule((2048, 4096), (1, 2)),
    "bidirectional": DilationSchedule((2048, 4096), (1, 2), is_causal=False, padding="zeros"),
    "once, sinks, window": DilationSchedule(
        (256, 1024, 4096), (1, 4, 16), overlap="once", num_sink_tokens=4, local="sliding"
    ),
    "once, not nested": DilationSchedule((256, 1000), (1, 3), overlap="once", head_offsets="contiguous"),
    "sinks alone": DilationSchedule((256, 1024), (2, 4), num_sink_tokens=4),
}


def record_launches(schedule: DilationSchedule, dtype: torch.dtype, width: int, packed: bool = False,
                    length: int = 8192, heads: int = 8, groups: int = 2,
                    tiles: triton_attention.Tiles | None = None) -> list[tuple[Any, dict, Any]]:  # fmt: skip
    """(kernel, arguments, tiles) of every launch of a forward and backward, none of which is started.

    tiles: of all kernels, instead of those that the backend chooses.
    """
    query = torch.empty(2, length, heads, width, dtype=dtype, device="meta").transpose(1, 2)
    key, value = (torch.empty(2, length, groups, width, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
    ids = torch.arange(length).div(3000, rounding_mode="floor").expand(2, -1) if packed else None
    launches, start, choose = [], triton_attention.start_kernel, triton_attention.choose_tiles
    if tiles:
        triton_attention.choose_tiles = lambda *_: tiles
    triton_attention.start_kernel = lambda kernel, programs, arguments, device, tiles: launches.append(
        (kernel, arguments, tiles)
    )
    try:
        call = triton_attention.TritonCall(query, key, value, ids, 0, schedule, Heads.of(query, key), width**-0.5)
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        triton_attention.triton_forward(call, out, lse)
        triton_attention.triton_backward(call, torch.empty_like(out), out, lse)
    finally:
        triton_attention.start_kernel, triton_attention.choose_tiles = start, choose
    return launches


def _compile_here(settings: dict) -> tuple[int, str]:
    launches = record_launches(**settings)
    try:
        for kernel, arguments, tiles in launches:
            kernel.warmup(**arguments, grid=(1,), num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    except Exception as error:  # whatever the compiler says; the launch itself will say it again
        return 0, f"{settings}: {type(error).__name__}: {error}"[:300]
    return len(launches), ""


def compile_ahead(settings: list[dict], processes: int | None = None) -> tuple[int, list[str]]:
    """Compiles what these arguments of `record_launches` would launch, for the GPU of this machine and into Triton's
    cache on disk, in processes side by side: one after the other, each kernel takes about a second.

    Returns the number of launches, and what went wrong.
    """
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool:
        done = list(tqdm(pool.map(_compile_here, settings), total=len(settings), desc="compiling", unit="setting"))
    return sum(count for count, _ in done), [error for _, error in done if error]


def signature_of(kernel: Any, arguments: dict) -> tuple[dict, dict, dict]:
    """(types, constants, attributes), as Triton's just-in-time compiler would specialise these arguments."""
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and isinstance(value, int) and value == 1):
            types[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if free and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_kernel(kernel: Any, arguments: dict, tiles: Any, arch: int) -> dict[str, Any]:
    """Registers, bytes of spills, shared memory and tensor-core instructions of one launch on sm_`arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature_of(kernel, arguments)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dump(what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            return subprocess.run([tool, what, cubin.name], capture_output=True, text=True, check=True).stdout

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage")).groups()
    assembly = dump("--dump-sass")
    return {
        "registers": int(registers), "spilled_bytes": int(stack), "shared_kib": compiled.metadata.shared / 1024,
        "wgmma": assembly.count("HGMMA"), "mma": assembly.count("HMMA."), "async_copies": assembly.count("LDGSTS"),
    }  # fmt: skip


def check(archs: list[int], dtypes: list[str], widths: list[int], schedules: list[str],
          report: Callable[[dict], None]) -> list[dict]:  # fmt: skip
    """Compiles what every schedule launches; launches that would be compiled alike are compiled once."""
    rows, seen = [], set()
    kinds = [(name, packed) for name in schedules for packed in ((False, True) if name == "count" else (False,))]
    for arch, dtype, width, (name, packed) in itertools.product(archs, dtypes, widths, kinds):
        for kernel, arguments, tiles in record_launches(SCHEDULES[name], getattr(torch, dtype), width, packed):
            key = str((arch, kernel.__name__, *signature_of(kernel, arguments), tiles))
            if key in seen:
                continue
            seen.add(key)
            setting = {
                "kernel": kernel.__name__, "arch": arch, "dtype": dtype, "head_dim": width,
                "schedule": name + ", packed" * packed, **vars(tiles),
            }  # fmt: skip
            rows.append(setting | compile_kernel(kernel, arguments, tiles, arch))
            report(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], help="compute capabilities")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=["float16", "bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--strict", action="store_true", help="spilled registers are an error")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing. Unset it.")
    if not HAS_TRITON:
        parser.error("Triton is not installed (pip install triton; Linux).")

    def report(row):
        print(
            f"{row['kernel']:18} sm_{row['arch']} {row['dtype']} D={row['head_dim']} {row['schedule']:20} "
            f"{row['BM']}x{row['BN']} warps {row['num_warps']} stages {row['num_stages']}: "
            f"registers {row['registers']}, spilled {row['spilled_bytes']}, shared {row['shared_kib']:.0f} KiB, "
            f"wgmma {row['wgmma']}, mma {row['mma']}, async copies {row['async_copies']}", flush=True,
        )  # fmt: skip

    rows = check(args.arch, args.dtype, args.head_dim, args.schedule, report)
    spills = [row for row in rows if row["spilled_bytes"]]
    print(f"{len(rows)} kernels compiled, {len(spills)} of them spill registers")
    if args.output:
        write_json(args.output, provenance() | {"kernels": rows})
    if spills and args.strict:
        sys.exit(1)


if __name__ == "__main__":
    main()
