"""By which heads does a pretrained model find? The score of each key/value head (`find_memory_heads`), text by text.

    python -m examples.benchmarks.memory_heads --output docs/results/memory_heads.json

The heads of `examples.evidence.reading.SMOLLM2_HEADS` come from it. Beside the JSON file lies the map, .png.
"""

import argparse
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet.memory_heads import best_heads, score_heads


def mean_of(scores: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    """Of the scores of several texts."""
    return {layer: [sum(x) / len(x) for x in zip(*(own[layer] for own in scores))] for layer in scores[0]}


def overlap(one: dict[int, list[int]], other: dict[int, list[int]]) -> int:
    """How many heads stand in both."""
    return sum(len({*heads} & {*other.get(layer, ())}) for layer, heads in one.items())


def draw(result: dict, path: Path) -> None:
    """Layers by heads; the chosen ones are framed."""
    scores = {int(layer): own for layer, own in result["scores"].items()}
    figure, (axis,) = new_figure(1)
    grid = [list(row) for row in zip(*scores.values())]
    image = axis.imshow(
        grid, cmap="Blues", vmin=0, aspect="auto", extent=(-0.5, len(scores) - 0.5, len(grid) - 0.5, -0.5)
    )
    places = list(scores)
    for layer, heads in result["best"].items():
        for head in heads:
            x = places.index(int(layer))
            axis.plot([x - 0.5, x + 0.5, x + 0.5, x - 0.5, x - 0.5], [head - 0.5] * 2 + [head + 0.5] * 2 + [head - 0.5],
                      color="C1")  # fmt: skip
    axis.set_xticks(range(0, len(places), 3), places[::3])
    axis.set_yticks(range(len(grid)))
    axis.set(xlabel="layer", ylabel="key/value head")
    figure.colorbar(image, ax=axis, label="share of attention to the fact that is told\n(framed: chosen)")
    save_figure(figure, path, result["provenance"])


def main(arguments: list[str] | None = None) -> dict:
    """Measures, prints the best heads, writes; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--texts", nargs="+", default=["python-docs", "python-source", "king-james"],
                        help="names of texts.py, paths; a part of each is read")  # fmt: skip
    parser.add_argument("--begin", type=int, default=20_000, help="first character of the parts")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--num-heads", type=int, help="to choose; default one in five")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; the map is written beside it")
    options = parser.parse_args(arguments)
    path = options.model or str(smollm2_135m())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    began, by_text = time.process_time(), {}
    for name in options.texts:
        part = load_text(name)[options.begin :][: 12 * options.length]
        by_text[name] = score_heads(model, tokenizer, [part], length=options.length, progress=False)
    seconds, scores = time.process_time() - began, mean_of(list(by_text.values()))
    best = best_heads(scores, options.num_heads)
    alone = {name: overlap(best, best_heads(own, options.num_heads)) for name, own in by_text.items()}
    result = {
        "provenance": provenance(), "model": Path(path).name, "texts": options.texts, "begin": options.begin,
        "length": options.length, "CPU seconds": seconds, "scores": scores, "best": best,
        "of these chosen by one text alone": alone,
    }  # fmt: skip
    write_json(options.output, result)
    draw(result, options.output.with_suffix(".png"))
    print(f"heads that the model finds by: {best}")
    return result


if __name__ == "__main__":
    main()
