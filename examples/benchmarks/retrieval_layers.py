"""Which layers of a pretrained model quote from far away? Those are worth leaving dense: `patch_model(layers=...)`.

Quoting takes two steps, which different layers do: some heads find earlier occurrences of the current token, and heads
of later layers copy what followed them (induction heads). What counts is the attention given to such keys beyond a
window and past the first tokens, on a text that the model is to be used for: dilated attention offers a head only every
r-th of them. Leave the first few layers of both columns dense.

    python -m examples.benchmarks.retrieval_layers --output docs/results/retrieval_layers.json
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.reporting import provenance, write_json
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet.transformers_compat import attention_of


NAME = "quoting_probe"
NUM_SINKS = 4


def quoted_keys(tokens: torch.Tensor, queries: torch.Tensor, window: int) -> torch.Tensor:
    """Bool [2, Q, N]: keys at least `window` tokens back that are the query's token, and those that follow it there."""
    position = torch.arange(len(tokens), device=tokens.device)
    is_far = (queries[:, None] - position >= window) & (position >= NUM_SINKS)
    before = torch.cat([tokens.new_full((1,), -1), tokens[:-1]])
    return is_far & (torch.stack([tokens, before])[:, None] == tokens[queries, None])


@torch.inference_mode()
def quoting_by_head(model: PreTrainedModel, tokens: torch.Tensor, window: int, every: int = 4) -> torch.Tensor:
    """Mean attention of each head to `quoted_keys`, [2, layers, H], over queries in the last quarter of [N] tokens.

    The model attends densely meanwhile, whatever its attention was, which it has again afterwards. Only `every` n-th
    query is looked at.
    """
    length = len(tokens)
    queries = torch.arange(length - length // 4, length, every, device=tokens.device)
    quoted = quoted_keys(tokens, queries, window)
    hidden = queries[:, None] < torch.arange(length, device=tokens.device)
    scores: dict[int, torch.Tensor] = {}
    bar = tqdm(total=model.config.num_hidden_layers, desc="layers")

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        chosen = query[0, :, queries] @ key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).mT
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        weights = (chosen.float() * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        scores[module.layer_idx] = torch.stack([(weights * keys).sum(-1).mean(-1) for keys in quoted])
        bar.update()
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    original = attention_of(model.config)
    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)
    try:
        model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(original)
        bar.close()
    return torch.stack([scores[layer] for layer in sorted(scores)], 1)


def main(arguments: list[str] | None = None) -> dict:
    """Prints the layers that quote most; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M, from pip")
    parser.add_argument("--text", default="python-docs", help="a name known to texts.py, a file or a folder")
    parser.add_argument("--length", type=int, default=8192, help="tokens to read, from the text's beginning")
    parser.add_argument("--window", type=int, default=1024, help="w_0 / 2 of the schedule: keys nearer do not count")
    parser.add_argument("--most", type=int, default=10, help="layers to print")
    parser.add_argument("--output", type=Path, help="a JSON file with every head's figure")
    options = parser.parse_args(arguments)
    path = options.model or str(smollm2_135m())
    # A token is hardly ever longer than 32 characters, and never shorter than one.
    text = load_text(options.text)[: options.length * 32]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(path)(text, verbose=False).input_ids[: options.length])
    if len(tokens) < 2 * options.window:
        parser.error(f"--text has {len(tokens)} tokens; at least {2 * options.window}, twice --window, are needed")
    scores = quoting_by_head(AutoModelForCausalLM.from_pretrained(path).eval(), tokens, options.window)
    order = scores.sum(2).argsort(1, descending=True).tolist()
    print(f"attention to tokens at least {options.window} back, summed over a layer's heads")
    print("     find the same token     copy what followed it")
    for rank in range(min(options.most, scores.shape[1])):
        print("".join(f"     layer {row[rank]:3}  {by[row[rank]].sum():.3f}  " for row, by in zip(order, scores)))
    result = {
        "provenance": provenance(), "model": Path(path).name, "text": Path(options.text).name, "length": len(tokens),
        "window": options.window, "layers that find": order[0], "layers that copy": order[1],
        "finding": scores[0].tolist(), "copying": scores[1].tolist(),
    }  # fmt: skip
    if options.output:
        write_json(options.output, result)
    return result


if __name__ == "__main__":
    main()
