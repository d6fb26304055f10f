"""Reads a long text once, and answers questions about facts that were planted in it, far beyond the model's window.

    python -m examples.ask_a_book --length 16384 --output-dir runs/ask-a-book

The model is patched with a memory. It reads the text by chunks into a cache, which is saved: asked again, it does not
read again. After each answer the cache forgets the question (`crop`), so that questions do not see each other.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.reporting import provenance, write_json
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet import DilatedCache, patch_model
from modeling_longnet.dilated_cache_file import load_cache, save_cache
from modeling_longnet.transformers_compat import named_cache


MEMORY = {"block_size": 4, "top_k": 64}
QUESTION = "\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
NAMES = "Alice Bruno Clara Dmitri Elena Farid Greta Hugo Ingrid Jonas Karin Leon Marta Nadia Oscar Paula".split()


def plant(book: list[int], encode, count: int, seed: int = 0) -> tuple[list[int], list[tuple[str, str]]]:
    """The text with `count` facts spread over it, and the names and numbers of these facts."""
    chosen = random.Random(seed)
    facts = [(name, str(chosen.randrange(1000, 9999))) for name in chosen.sample(NAMES, count)]
    step, text = len(book) // (count + 1), []
    for i, (name, number) in enumerate(facts):
        text += book[i * step : (i + 1) * step] + encode(f"\nThe secret number of {name} is {number}.\n")
    return text + book[count * step :], facts


@torch.inference_mode()
def read(model: PreTrainedModel, text: list[int], chunk_size: int) -> DilatedCache:
    """The cache of a model that has read the text."""
    cache = DilatedCache(model.config)
    with tqdm(total=len(text), unit="tok", desc="reading") as bar:
        for start in range(0, len(text), chunk_size):
            chunk = torch.tensor([text[start : start + chunk_size]], device=model.device)
            model(input_ids=chunk, use_cache=True, logits_to_keep=1, **named_cache(cache))
            bar.update(chunk.shape[1])
    return cache


@torch.inference_mode()
def ask(model: PreTrainedModel, cache: DilatedCache, question: list[int], new_tokens: int) -> list[int]:
    """The greedy answer to a question behind the text; the cache is then as it was."""
    cache.activate_past_recording()
    answer, new, read_tokens = [], question, 0
    for _ in range(new_tokens):
        tokens = torch.tensor([new], device=model.device)
        logits = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **named_cache(cache)).logits
        read_tokens += len(new)
        new = [int(logits[0, -1].argmax())]
        answer += new
    cache.crop(-read_tokens)
    return answer


def main(arguments: list[str] | None = None) -> dict:
    """Reads, asks, prints; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--text", default="python-docs", help="a name known to texts.py, a file or a folder")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the text")
    parser.add_argument("--questions", type=int, default=10, choices=range(1, len(NAMES) + 1), metavar="N")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ask-a-book"), help="of cache and answers")
    options = parser.parse_args(arguments)
    path = options.model or str(smollm2_135m())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    patch_model(model, segment_lengths=[512], dilation_rates=[1], memory=MEMORY)
    book = encode(load_text(options.text)[: options.length * 8])[: options.length]
    text, facts = plant(book, encode, options.questions)
    file, began = options.output_dir / f"{options.length}.safetensors", time.perf_counter()
    if file.exists():
        cache, _ = load_cache(file, model)
    else:
        cache = read(model, text, options.chunk_size)
        save_cache(file, cache, model)
    seconds, answers = time.perf_counter() - began, []
    print(f"{len(text):,} tokens in {seconds:.0f} s; the cache holds {cache.memory_footprint() / 2**20:.0f} MiB")
    for name, number in facts:
        answer = tokenizer.decode(ask(model, cache, encode(QUESTION.format(name=name)), 5)).strip()
        answers.append({"name": name, "number": number, "answer": answer, "right": answer.startswith(number)})
        print(f"{name:8} {number}   {'right' if answers[-1]['right'] else 'WRONG'}   {answer!r}")
    right = sum(answer["right"] for answer in answers)
    print(f"{right} of {len(answers)} right")
    result = {
        "provenance": provenance(), "model": Path(path).name, "text": Path(options.text).name, "tokens": len(text),
        "seconds to read": round(seconds, 1), "bytes": cache.memory_footprint(), "memory": MEMORY, "right": right,
        "answers": answers,
    }  # fmt: skip
    write_json(options.output_dir / f"{options.length}.json", result)
    return result


if __name__ == "__main__":
    main()
