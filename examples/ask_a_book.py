"""Reads a long text once into a bank on disk, and answers questions about facts that were planted in it, far beyond the
model's window.

    python -m examples.ask_a_book --length 60000 --output-dir runs/ask-a-book

The model is patched with a memory. What it reads goes into a folder (`MemoryBank`), once, however often it is asked. A
question is answered in three steps: the bank names the passages that the question is about, by the model's own
attention; the model reads the question behind each of them, and the likeliest are read again in front of the question,
the best one last. With `--passages 0` the question stands behind the whole text and the memory alone answers. Ctrl-C,
or a crash, costs what was read since the last save; the same command goes on.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.measuring import peak_memory
from examples.reporting import provenance, write_json
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet import DilatedCache, MemoryBank, Passage, patch_model
from modeling_longnet.transformers_compat import named_cache


MEMORY = {"block_size": 4, "top_k": 64}
QUESTION = "\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
NOTHING = "\n\nQuestion: What is this?\nAnswer: This is"
GAP, AROUND = "\n...\n", 16  # between passages that are read again; tokens before and behind each
CANDIDATES = 32  # passages that are found, of which a few are read again
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
def ask(model: PreTrainedModel, cache: DilatedCache, question: list[int], new_tokens: int) -> list[int]:
    """The greedy answer to a question behind what the cache has read."""
    answer, new = [], question
    for _ in range(new_tokens):
        tokens = torch.tensor([new], device=model.device)
        logits = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **named_cache(cache)).logits
        new = [int(logits[0, -1].argmax())]
        answer += new
    return answer


def read_again(bank: MemoryBank, passages: list[Passage], gap: list[int]) -> list[int]:
    """The passages' text, with a little of what is around each."""
    return [token for passage in passages for token in passage.cut(bank.input_ids, AROUND).tolist() + gap]


def main(arguments: list[str] | None = None) -> dict:
    """Reads, asks, prints; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--text", default="python-docs", help="a name known to texts.py, a file or a folder")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the text")
    parser.add_argument("--questions", type=int, default=10, choices=range(1, len(NAMES) + 1), metavar="N")
    parser.add_argument("--passages", type=int, default=4, help="to read again for a question; 0: ask the memory alone")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--reach", type=int, help="tokens before a chunk to choose among while reading; default: all")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ask-a-book"), help="for the bank and the answers")
    options = parser.parse_args(arguments)
    path = options.model or str(smollm2_135m())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    patch_model(model, segment_lengths=[512], dilation_rates=[1], memory=MEMORY)
    book = encode(load_text(options.text)[: options.length * 8])[: options.length]
    text, facts = plant(book, encode, options.questions)
    name = str(options.length) + (f"-reach-{options.reach}" if options.reach else "")
    folder, began = options.output_dir / name, time.process_time()
    bank = MemoryBank.from_tokens(model, [text], folder, chunk_size=options.chunk_size, reach=options.reach)
    seconds, reading, answers = time.process_time() - began, peak_memory(), []
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{len(bank):,} tokens; {seconds:.0f} s of processor time in this call; {size / 2**20:.0f} MiB on disk")
    for person, number in tqdm(facts, unit="question"):
        began, question, cache, passages = time.process_time(), encode(QUESTION.format(name=person)), None, []
        if options.passages:
            found = bank.find_passages(model, question, encode(NOTHING), count=CANDIDATES)
            ranked = bank.rank_passages(model, found, question, around=AROUND)
            passages = ranked[: options.passages][::-1]
            question, cache = read_again(bank, passages, encode(GAP)) + question, DilatedCache(model.config)
        answer = ask(model, cache or bank.start_cache(model), question, 5)
        answer = tokenizer.decode(answer).strip()
        right = answer.startswith(number)
        answers.append({"name": person, "number": number, "answer": answer, "right": right})
        answers[-1]["passages"] = [passage.start for passage in passages]
        answers[-1]["seconds"] = round(time.process_time() - began, 2)
        tqdm.write(f"{person:8} {number}   {'right' if right else 'WRONG'}   {answer!r}")
    right = sum(answer["right"] for answer in answers)
    print(f"{right} of {len(answers)} right")
    result = {
        "provenance": provenance(), "model": Path(path).name, "text": Path(options.text).name, "tokens": len(bank),
        "seconds to read, in the last call": round(seconds, 1), "bytes on disk": size, "memory": MEMORY,
        "reach": options.reach, "bytes in memory, reading": reading, "bytes in memory": peak_memory(),
        "passages": options.passages, "right": right, "answers": answers,
    }  # fmt: skip
    kind = "" if options.passages else "-memory-alone"
    write_json(options.output_dir / f"{name}{kind}.json", result)
    return result


if __name__ == "__main__":
    main()
