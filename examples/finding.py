"""What the demo shows of finding: a passkey hidden in a text, asked for of a model that is dense, patched, or patched
with a memory in the heads that it finds by. Nothing is trained."""

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from examples.evidence.reading import ask, patched, read
from examples.evidence.ruler_tasks import DEPTHS, Tasks, score
from modeling_longnet import find_memory_heads


LENGTH, WINDOW = 2048, [1024]  # tokens of a text; the segment of a memory's window, less than half of the text
FORMS = ("dense", "patched", "patched, with a memory")


@torch.inference_mode()
def find_passkeys(model: PreTrainedModel, tokenizer, text: str, settings: dict, length: int = LENGTH) -> dict:
    """By form, what was found at each of DEPTHS, 1.0 or 0.0; the model is as before.

    Args:
        text: tells the heads that find. settings: of `patch_model`, without a memory.
    """
    tasks = Tasks(lambda part: tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
    cases = [tasks.make("passkey", length, trial) for trial in range(len(DEPTHS))]
    heads = find_memory_heads(model, tokenizer, [text], progress=False, length=length)
    memory = {"segment_lengths": WINDOW, "dilation_rates": [1], "memory": {"heads": heads}}
    found = {}
    with tqdm(total=len(FORMS) * len(cases), desc="finding passkeys", unit="text") as bar:
        for form, patch in zip(FORMS, (None, settings, memory)):
            found[form] = []
            with patched(model, patch):
                for case in cases:
                    (question,) = case.questions
                    said = ask(model, read(model, case.text), question, tokenizer)
                    found[form].append(score(question, said))
                    bar.update()
    return {"tokens": length, "depths": list(DEPTHS), "heads": sum(map(len, heads.values())), "found": found}


def in_words(finding: dict) -> str:
    """A line for each form."""
    depths = ", ".join(f"{depth:.0%}" for depth in finding["depths"])
    lines = [
        f"  {form:24} {sum(found):.0f} of {len(found)}" + f" ({finding['heads']} heads)" * ("memory" in form)
        for form, found in finding["found"].items()
    ]
    title = f"Found, of passkeys hidden at {depths} of {finding['tokens']:,} tokens, by the model without LoRA:"
    return "\n".join([title, *lines])
