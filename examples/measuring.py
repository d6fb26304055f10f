"""Peak memory and CPU time of what a script measures; a peak that begins anew is Linux's."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm


def process_memory(counter: str) -> int:
    """Bytes of this process: "VmRSS" resident now, "VmHWM" the most since `reset_peak_memory` or its start.

    Where the system does not tell, the most since its start.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.read_text().split(f"{counter}:")[1].split()[0]) * 1024


def memory_in_use(device: str | torch.device = "cpu") -> int:
    """Bytes in use now: allocated by PyTorch on a GPU, resident in the process on a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.memory_allocated(device) if on_gpu else process_memory("VmRSS")


def peak_memory(device: str | torch.device = "cpu") -> int:
    """The most bytes in use since `reset_peak_memory`.

    On a CPU, measure in a fresh process: memory that earlier work left behind could be used again unseen.
    """
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.max_memory_allocated(device) if on_gpu else process_memory("VmHWM")


def reset_peak_memory(device: str | torch.device = "cpu") -> int:
    """Begins to count anew, where the system can; the bytes in use now."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (counter := Path("/proc/self/clear_refs")).exists():
        counter.write_text("5")
    return memory_in_use(device)


def clock(device: str = "cpu") -> float:
    """Seconds that a device has worked: of all threads, which other load changes less; by the clock on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(run: Callable[[], object], device: str = "cpu") -> dict[str, float]:
    """Seconds of one call by the clock, and on a CPU those that all threads worked, which other load changes less."""
    if device == "cuda":
        torch.cuda.synchronize()
    began, worked = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}


def in_turns(runs: dict, repeats: int, device: str = "cpu") -> dict[str, list[dict[str, float]]]:
    """Measures each of `runs` `repeats` times, one after the other, after one call of each that does not count."""
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc="measuring", unit="turn"):
        for name, run in runs.items():
            times[name].append(measure(run, device))
    return times


def median(times: list[dict[str, float]], key: str = "seconds") -> float:
    return statistics.median(row[key] for row in times)


def least(times: list[dict[str, float]], key: str = "seconds") -> float:
    return min(row[key] for row in times)


def median_ratio(over: list[dict[str, float]], under: list[dict[str, float]], key: str) -> float:
    """Median of the ratios turn by turn."""
    return statistics.median(a[key] / b[key] for a, b in zip(over, under))
