"""What would a step cost with 1M to 1B tokens on 8 to 1,024 GPUs? A plan on paper; docs/scaling.md explains it.

    python -m examples.benchmarks.scaling_cost_model --preset configuration/longnet-2.7b.json

The bytes that travel are a bound on what sequence_exchange.py plans (a test compares the two). Speeds are assumptions,
given as options; nothing here was timed on a GPU.

Letters: N tokens of the text, W GPUs, n = N / W tokens of a GPU, P parameters, L layers, H heads, G key/value heads,
D head dimension, w segment length, r dilation rate.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser

from examples.reporting import provenance, write_json
from examples.runs import geometric_patterns
from modeling_longnet import LongNetConfig


@dataclass
class Hardware:
    """Assumptions: an H100 SXM with eight GPUs a node by its data sheet, and fractions of the peaks."""

    flops: float = 989e12  # bf16, dense, of a GPU
    dense_efficiency: float = 0.45  # of matrix products in training
    attention_efficiency: float = 0.35  # of the attention kernels, forward and backward
    memory: float = 80e9  # bytes of a GPU
    node_size: int = 8
    node_bandwidth: float = 300e9  # bytes a second a GPU receives within a node
    network_bandwidth: float = 40e9  # and between nodes
    latency: float = 10e-6  # seconds a message


@dataclass
class Model:
    parameters: float
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int


def load_model(preset: str | Path) -> Model:
    config = LongNetConfig.from_pretrained(preset)
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 2 * config.hidden_size * config.intermediate_size
    parameters = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    return Model(parameters, config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
                 config.num_key_value_heads, config.head_dim)  # fmt: skip


def bytes_received(patterns: list[tuple[int, int]], gpus: int, tokens: int, model: Model) -> float:
    """At most, by a GPU in a layer's forward: of each pattern longer than a slice, the selected rows elsewhere."""
    n = tokens / gpus
    per_group = model.heads // model.kv_heads
    rows = sum(min(per_group, r) * (w - min(w, n)) / r + min(per_group, r) for w, r in patterns if w > n)
    return rows * model.kv_heads * 2 * model.head_dim * 2


def attention_flops(patterns: list[tuple[int, int]], tokens: float, model: Model) -> float:
    """Of a causal forward over `tokens` queries in a layer: each pattern shows w / r / 2 keys to one query in r."""
    pairs = sum(tokens / r * (w / r) / 2 for w, r in patterns)
    return 4 * model.head_dim * model.heads * pairs


def estimate(tokens: int, gpus: int, model: Model, hardware: Hardware, first: int = 2048, ratio: int = 4) -> dict:
    """One step on one text split over all GPUs: FSDP2, bf16, gradient checkpointing of every layer, AdamW."""
    patterns, n = geometric_patterns(tokens, first, ratio, clip=True), tokens / gpus
    bandwidth = hardware.node_bandwidth if gpus <= hardware.node_size else hardware.network_bandwidth
    # Parameters, gradients and AdamW states; the input of each layer; one layer at work; its received keys twice.
    received = bytes_received(patterns, gpus, tokens, model)
    states = 16 * model.parameters / gpus + 2 * 2 * model.parameters / model.layers
    activations = 2 * n * model.hidden_size * (model.layers + 34)
    memory = states + activations + 3 * received
    dense = 8 * model.parameters * n / (hardware.flops * hardware.dense_efficiency)
    attention = 4.5 * model.layers * attention_flops(patterns, n, model)
    attention /= hardware.flops * hardware.attention_efficiency
    # Received in the forward and again in its recomputation, given back in the backward; parameters gathered twice.
    exchange = 3 * model.layers * (received / bandwidth + gpus * hardware.latency * (received > 0))
    parameters = 3 * 2 * model.parameters / bandwidth
    compute = dense + attention
    return {
        "tokens": tokens,
        "gpus": gpus,
        "patterns": len(patterns),
        "largest rate": patterns[-1][1],
        "memory (GB a GPU)": memory / 1e9,
        "fits": memory < 0.9 * hardware.memory,
        "received (MB a layer)": received / 1e6,
        "dense (s)": dense,
        "attention (s)": attention,
        "exchange (s)": exchange,
        "parameters (s)": parameters,
        "step (s)": max(compute, parameters) + exchange,
        "tokens a second": tokens / (max(compute, parameters) + exchange),
    }


def _cell(value: float | int | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"


def table(rows: list[dict]) -> str:
    """Markdown; one row per text length and number of GPUs."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " ---: |" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row.values())) + " |" for row in rows)])


def main(arguments: list[str] | None = None) -> dict:
    """Prints the table; returns what the file holds."""
    parser = HfArgumentParser(Hardware, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="configuration/longnet-2.7b.json", help="a model configuration")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**20, 2**24, 2**27, 2**30])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--first", type=int, default=2048, help="tokens of the first segment")
    parser.add_argument("--ratio", type=int, default=4, help="of each segment to the one before")
    parser.add_argument("--output", type=Path, help="a JSON file")
    hardware, args = parser.parse_args_into_dataclasses(arguments)
    model = load_model(args.preset)
    rows = [estimate(n, w, model, hardware, args.first, args.ratio) for n in args.tokens for w in args.gpus]
    print(table(rows))
    result = {"provenance": provenance(), "hardware": vars(hardware), "model": vars(model), "rows": rows}
    if args.output:
        write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
