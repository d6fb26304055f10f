"""In which layers of a pretrained model is a memory worth most? Each layer is left out alone (`find_memory_heads`).

    python -m examples.benchmarks.memory_layers --output docs/results/memory_layers.json

The layers of `examples.evidence.reading.SMOLLM2_LAYERS` come from it. Beside the JSON file lies the plot, .png.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.evidence.reading import DEFAULT_PATCH
from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet import patch_model
from modeling_longnet.memory_heads import best_layers, leave_layers_out


def draw(result: dict, path: Path) -> None:
    """Two bars a layer."""
    figure, axes = new_figure(2)
    for axis, name in zip(axes, ("finding", "reading")):
        colors = ["C0" if x["layer"] in result["best"] else "lightgray" for x in result["layers"]]
        axis.bar([x["layer"] for x in result["layers"]], [x[name] for x in result["layers"]], color=colors)
        axis.set_yscale("symlog", linthresh=0.2 if name == "finding" else 0.005)
        what = "an answer" if name == "finding" else "a word of the text"
        axis.set(xlabel="layer that sees the schedule alone (blue: chosen)", ylabel=f"nats that {what} is told worse")
    save_figure(figure, path, result["provenance"])


def main(arguments: list[str] | None = None) -> dict:
    """Measures, prints the best layers, writes; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--texts", nargs="+", default=["python-docs", "python-source", "king-james"],
                        help="names of texts.py, paths; a part of each is read")  # fmt: skip
    parser.add_argument("--begin", type=int, default=100_000, help="first character of the parts")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--num-layers", type=int, help="to choose; default a half, and one more")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; the plot is written beside it")
    options = parser.parse_args(arguments)
    path = options.model or str(smollm2_135m())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    patch_model(model, **DEFAULT_PATCH)
    parts = [load_text(name)[options.begin :][: 12 * options.length] for name in options.texts]
    worths = leave_layers_out(model, tokenizer, parts, length=options.length)
    best = best_layers(worths, options.num_layers or len(worths) // 2 + 1)
    result = {"provenance": provenance(), "model": Path(path).name, "texts": options.texts, "begin": options.begin,
              "length": options.length, "schedule": DEFAULT_PATCH, "layers": [asdict(x) for x in worths],
              "best": best}  # fmt: skip
    write_json(options.output, result)
    draw(result, options.output.with_suffix(".png"))
    print(f"layers that a memory is worth most in: {best}")
    return result


if __name__ == "__main__":
    main()
