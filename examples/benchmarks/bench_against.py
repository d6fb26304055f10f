"""Is this checkout as fast as another commit? CPU time of what users wait for, both sides in turns; fails above 5 %.

    make bench-against REV=HEAD~1
    python -m examples.benchmarks.bench_against HEAD~1 --rounds 7 --cases operator decode

Each side is a process of its own with one thread that does a case when it is asked to, so that both meet the same
machine; the ratio is that of the smallest CPU times, which other work on the machine disturbs least.
"""

import argparse
import contextlib
import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm


ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1.05
LLAMA = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 32768,
}  # fmt: skip


def _operator(length: int, backward: bool) -> Callable[[], object]:
    from modeling_longnet import dilated_attention

    tensors = [torch.randn(1, 4, length, 64, requires_grad=backward) for _ in range(3)]
    schedule = {"segment_lengths": [512, 2048, 8192], "dilation_rates": [1, 4, 16]}

    def run():
        out = dilated_attention(*tensors, **schedule)
        if backward:
            torch.autograd.grad(out.sum(), tensors)

    return run


def _patched(**training) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    from modeling_longnet import patch_model

    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    return patch_model(model, segment_lengths=[512, 2048, 8192], dilation_rates=[1, 4, 16]).eval()


def _prefill() -> Callable[[], object]:
    model, tokens = _patched(), torch.randint(0, 1024, (1, 8192))
    return torch.no_grad()(lambda: model(tokens, use_cache=False, logits_to_keep=1))


def _decode() -> Callable[[], object]:
    from modeling_longnet import DilatedCache

    model = _patched()
    cache, text = DilatedCache(model.config), torch.randint(0, 1024, (1, 2048))
    (name,) = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)  # by release

    @torch.no_grad()
    def run():
        for _ in range(40):
            model(text[:, :1], **{name: cache}, use_cache=True)

    with torch.no_grad():
        model(text, **{name: cache}, use_cache=True)
    return run


def _train_step(sharded: bool) -> Callable[[], object]:
    from modeling_longnet import LongNetConfig, LongNetForCausalLM

    config = LongNetConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        segment_lengths=[512, 2048], dilation_rates=[1, 4],
    )  # fmt: skip
    model, tokens = LongNetForCausalLM(config).train(), torch.randint(0, 1024, (1, 4096))
    optimizer, batch = torch.optim.AdamW(model.parameters()), {"input_ids": tokens, "labels": tokens}
    if sharded:  # as one rank that holds all of a text does it
        from modeling_longnet.sequence_parallel import SequenceParallel

        sp = SequenceParallel(None, 1)
        sp.add_hooks(model)
        batch = sp.collator(lambda texts: texts)(batch)

    def run():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "operator": lambda: _operator(8192, backward=False),
    "operator-backward": lambda: _operator(8192, backward=True),
    "prefill": _prefill,
    "decode": _decode,
    "train-step": lambda: _train_step(sharded=False),
    "sharded-step": lambda: _train_step(sharded=True),
}


def serve() -> None:
    """One side: does the case whose name comes in, and answers with its CPU seconds."""
    torch.set_num_threads(1)
    ready: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in ready:
            torch.manual_seed(0)
            ready[name] = CASES[name]()
            ready[name]()  # not counted: plans are made, memory is fetched
        before = time.process_time()
        ready[name]()
        print(json.dumps(time.process_time() - before), flush=True)


@contextlib.contextmanager
def side(folder: Path) -> Iterator[Callable[[str], float]]:
    """A process with the package of `folder`, as a function from a case's name to its CPU seconds."""
    code = f"import runpy, sys; sys.path.insert(0, {str(folder)!r}); sys.argv = ['x', '--serve']\n"
    code += f"runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip

    def run(name: str) -> float:
        process.stdin.write(name + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the side in {folder.name} ended in case {name!r}: see its error above.")
        return json.loads(answer)

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of a commit in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        yield Path(folder)


def compare(revision: str, cases: list[str], rounds: int) -> dict[str, float]:
    """Ratio of this checkout's CPU time to the other's, per case."""
    ratios = {}
    with checkout(revision) as folder, side(ROOT) as ours, side(folder) as theirs:
        for name in tqdm(cases, unit="case"):
            times = [(ours(name), theirs(name)) for _ in range(rounds)]
            here, there = (min(column) for column in zip(*times))
            ratios[name] = here / there
    return ratios


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD~1", help="commit to compare with")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return 0
    ratios = compare(options.revision, options.cases, options.rounds)
    for name, ratio in ratios.items():
        print(f"{name:18} {ratio:.3f} of {options.revision}{'   SLOWER' if ratio > LIMIT else ''}")
    return int(max(ratios.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
