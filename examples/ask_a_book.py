"""Reads a long text once into a bank on disk, and answers questions about it, far beyond the model's window.

    python -m examples.ask_a_book --text my_book.txt --ask "Who is Marta?" "Where does she live?"
    python -m examples.ask_a_book --length 60000 --reach 4096

The model is patched with a memory in the heads that it finds by (`--heads all`: in all of them). What it reads goes
into a folder (`MemoryBank`), once, however often it is asked. A question is answered in three steps (`bank.ask`): the
bank names the passages that the question is about, by the model's own attention; the model reads the question behind
each of them, and the likeliest are read again in front of the question, the best one last. Without `--ask` facts are
planted, and asked for. With `--passages 0` the question stands behind the whole text and the memory alone answers.
With `--reach` a token costs the same to read however long the text is. Ctrl-C, or a crash, costs what was read since
the last save; the same command goes on.
"""

import argparse
import random
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.measuring import peak_memory
from examples.reporting import provenance, write_json
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet import DilatedCache, MemoryBank, find_memory_heads, patch_model
from modeling_longnet.memory_heads import FACT, LEAST
from modeling_longnet.memory_passages import TEMPLATE
from modeling_longnet.transformers_compat import named_cache


MEMORY = {"block_size": 4, "top_k": 64}
WINDOWS = {"found": 3072, "all": 512}  # segment lengths, at most; heads without a memory forget, and may see more
STRETCHES, STRETCH = 3, 2048  # parts of the book by which the heads that find are told, and their tokens at most
QUESTION = "What is the secret number of {name}?"
BEHIND = TEMPLATE.removeprefix("{passages}")  # where the memory alone answers
NAMES = "Alice Bruno Clara Dmitri Elena Farid Greta Hugo Ingrid Jonas Karin Leon Marta Nadia Oscar Paula".split()


def plant(book: list[int], encode, count: int, seed: int = 0) -> tuple[list[int], list[tuple[str, str]]]:
    """The text with `count` facts spread over it, and the names and numbers of these facts."""
    chosen = random.Random(seed)
    facts = [(name, str(chosen.randrange(1000, 9999))) for name in chosen.sample(NAMES, count)]
    step, text = len(book) // (count + 1), []
    for i, (name, number) in enumerate(facts):
        text += book[i * step : (i + 1) * step] + encode(FACT.format(name=name, number=number))
    return text + book[count * step :], facts


def patch(model: PreTrainedModel, tokenizer, book: list[int], heads: str) -> dict:
    """Patches the model to read this book; its memory. All heads have it where the book is too short to tell them."""
    memory, native = dict(MEMORY), getattr(model.config, "max_position_embeddings", None) or 2 * WINDOWS["found"]
    length = min(STRETCH, len(book) * 3 // 4, native // 2)
    if heads == "found" and length < LEAST:
        print("the text, or the model's context, is too short to tell the heads that find: all have a memory")
        heads = "all"
    if heads == "found":
        starts = range(0, len(book), -(-len(book) // STRETCHES)) if len(book) > STRETCHES * 2 * STRETCH else [0]
        stretches = [tokenizer.decode(book[start : start + 2 * STRETCH]) for start in starts]
        memory["heads"] = find_memory_heads(model, tokenizer, stretches, length=length)
    # Distances are clamped to half of the native context, and a window within it.
    patch_model(model, segment_lengths=[min(WINDOWS[heads], native // 2)], dilation_rates=[1], memory=memory)
    return memory


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


def answer_question(model: PreTrainedModel, bank: MemoryBank, tokenizer, question: str, passages: int) -> dict:
    """What is said, from where, and the processor time that it took."""
    began = time.process_time()
    if passages:
        said = bank.ask(model, tokenizer, question, passages=passages, max_new_tokens=24)
        text, starts = said.text, [passage.start for passage in said.passages]
    else:
        behind = tokenizer(BEHIND.format(question=question), add_special_tokens=False).input_ids
        text, starts = tokenizer.decode(ask(model, bank.start_cache(model), behind, 24)).strip(), []
    text = text.split("\n\n")[0]  # a model that was not trained to stop goes on asking
    return {"question": question, "answer": text, "passages": starts, "seconds": round(time.process_time() - began, 2)}


def main(arguments: list[str] | None = None) -> dict:
    """Reads, asks, prints; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--text", default="python-docs", help="a name known to texts.py, a file or a folder")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the text, at most")
    parser.add_argument("--ask", nargs="+", metavar="QUESTION", help="default: for facts that are planted in the text")
    parser.add_argument("--questions", type=int, default=10, choices=range(1, len(NAMES) + 1), metavar="N")
    parser.add_argument("--passages", type=int, default=2, help="to read again for a question; 0: ask the memory alone")
    parser.add_argument("--heads", choices=WINDOWS, default="found", help="that have a memory")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--reach", type=int, help="tokens before a chunk to choose among while reading; default: all")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ask-a-book"), help="for the bank and the answers")
    options = parser.parse_args(arguments)
    path = options.model or str(smollm2_135m())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    book = encode(load_text(options.text)[: options.length * 8])[: options.length]
    memory = patch(model, tokenizer, book, options.heads)
    text, facts = (book, []) if options.ask else plant(book, encode, options.questions)
    questions = options.ask or [QUESTION.format(name=name) for name, _ in facts]
    name = f"{Path(options.text).stem}-{options.length}-{options.heads}"
    name += f"-reach-{options.reach}" if options.reach else ""
    folder, began = options.output_dir / (name + ("-asked" if options.ask else "")), time.process_time()
    bank = MemoryBank.from_tokens(model, [text], folder, chunk_size=options.chunk_size, reach=options.reach)
    seconds, reading, answers = time.process_time() - began, peak_memory(), []
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{len(bank):,} tokens; {seconds:.0f} s of processor time in this call; {size / 2**20:.0f} MiB on disk")
    for i, question in enumerate(tqdm(questions, unit="question")):
        answers.append(answer_question(model, bank, tokenizer, question, options.passages))
        verdict = ""
        if facts:
            said = re.search(r"\d+", answers[-1]["answer"])
            answers[-1] |= {"number": facts[i][1], "right": said is not None and said[0] == facts[i][1]}
            verdict = "   right" if answers[-1]["right"] else f"   WRONG: {facts[i][1]}"
        tqdm.write(f"{question}   {answers[-1]['answer']!r}{verdict}")
    result = {
        "provenance": provenance(), "model": Path(path).name, "text": Path(options.text).name, "tokens": len(bank),
        "seconds to read, in the last call": round(seconds, 1), "bytes on disk": size, "memory": memory,
        "reach": options.reach, "bytes in memory, reading": reading, "bytes in memory": peak_memory(),
        "passages": options.passages, "answers": answers,
    }  # fmt: skip
    if facts:
        result["right"] = sum(answer["right"] for answer in answers)
        print(f"{result['right']} of {len(answers)} right")
    kind = "" if options.passages else "-memory-alone"
    write_json(folder.with_name(f"{folder.name}{kind}.json"), result)
    return result


if __name__ == "__main__":
    main()
