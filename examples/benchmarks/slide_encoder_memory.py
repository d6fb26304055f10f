"""What does one whole slide cost on this CPU? Time and peak memory of a slide encoder of a published shape.

Weights and tiles are random; neither changes the cost. The peak is that of the whole process, libraries and weights
included.

    python -m examples.benchmarks.slide_encoder_memory --tiles 10000
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoConfig

from examples.measuring import peak_memory
from examples.reporting import provenance, write_json
from examples.runs import REPOSITORY
from modeling_longnet import LongNetSlideEncoderModel


def read_slide(model: LongNetSlideEncoderModel, tiles: int) -> float:
    """Seconds for one slide of that many tiles, each in a grid cell of its own as far as there are cells."""
    config = model.config
    cells = torch.arange(tiles) % config.slide_ngrids**2
    coords = torch.stack([cells // config.slide_ngrids, cells % config.slide_ngrids], dim=-1) * config.tile_size
    embeddings = torch.randn(1, tiles, config.in_chans)
    with torch.inference_mode():
        start = time.perf_counter()
        output = model(embeddings, coords[None])
        seconds = time.perf_counter() - start
    assert output.pooler_output.isfinite().all()
    return seconds


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="longnet-slide-encoder-12l-768d", help="a folder in configuration/")
    parser.add_argument("--num-layers", type=int, help="other than the preset's")
    parser.add_argument("--tiles", type=int, default=10_000)
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args(arguments)
    config = AutoConfig.from_pretrained(REPOSITORY / "configuration" / options.preset)
    if options.num_layers:
        config.num_hidden_layers = options.num_layers
    torch.manual_seed(0)
    model = LongNetSlideEncoderModel(config).eval()
    seconds = read_slide(model, options.tiles)
    result = {
        "preset": options.preset,
        "layers": config.num_hidden_layers,
        "tiles": options.tiles,
        "seconds": round(seconds, 2),
        "peak_gb": round(peak_memory() / 1e9, 3),
        "provenance": provenance(),
    }
    print(f"{options.tiles} tiles, {config.num_hidden_layers} layers of {config.hidden_size}: {seconds:.1f} s, "
          f"peak {result['peak_gb']:.2f} GB")  # fmt: skip
    if options.output:
        write_json(options.output, result)
    return result


if __name__ == "__main__":
    main()
