"""Which layers of a pretrained model copy from far away? Those are worth leaving dense: `patch_model(layers=...)`.

A head that copies looks at what followed the earlier occurrences of the current token (an induction head). What counts
is the attention that a layer's heads give to such keys beyond a window and past the first tokens, on a text that the
model is to be used for: dilated attention offers a head only every r-th of these keys.

    python -m examples.benchmarks.retrieval_layers --output retrieval_layers.json
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.reporting import provenance, write_json
from examples.smollm2 import smollm2_135m
from examples.texts import load_text


NAME = "copying_probe"
NUM_SINKS = 4


def copying_keys(tokens: torch.Tensor, queries: torch.Tensor, window: int) -> torch.Tensor:
    """Bool [Q, N]: keys at least `window` tokens back that follow an earlier occurrence of the query's token."""
    position = torch.arange(len(tokens), device=tokens.device)
    follows = torch.cat([tokens.new_full((1,), -1), tokens[:-1]])
    is_far = (queries[:, None] - position >= window) & (position >= NUM_SINKS)
    return is_far & (follows == tokens[queries, None])


@torch.inference_mode()
def copying_by_head(model: PreTrainedModel, tokens: torch.Tensor, window: int, every: int = 4) -> torch.Tensor:
    """Mean attention to `copying_keys` of each head, float [layers, H], over queries in the last quarter of [N] tokens.

    The model attends densely meanwhile, whatever its attention was, which it has again afterwards. Only `every` n-th
    query is looked at.
    """
    length = len(tokens)
    queries = torch.arange(length - length // 4, length, every, device=tokens.device)
    copying = copying_keys(tokens, queries, window)
    hidden = queries[:, None] < torch.arange(length, device=tokens.device)
    scores: dict[int, torch.Tensor] = {}
    bar = tqdm(total=model.config.num_hidden_layers, desc="layers")

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        chosen = query[0, :, queries] @ key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).mT
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        weights = (chosen.float() * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        scores[module.layer_idx] = (weights * copying).sum(-1).mean(-1)
        bar.update()
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    original = model.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)
    try:
        model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(original)
        bar.close()
    return torch.stack([scores[layer] for layer in sorted(scores)])


def main(arguments: list[str] | None = None) -> dict:
    """Prints the layers that copy most; returns what the file holds."""
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
    scores = copying_by_head(AutoModelForCausalLM.from_pretrained(path).eval(), tokens, options.window)
    order = scores.sum(1).argsort(descending=True).tolist()
    print(f"attention to copies at least {options.window} tokens back, sum and maximum over a layer's heads")
    for layer in order[: options.most]:
        print(f"layer {layer:3}  {scores[layer].sum():.3f}  {scores[layer].max():.3f} (head {scores[layer].argmax()})")
    result = {
        "provenance": provenance(), "model": Path(path).name, "text": Path(options.text).name, "length": len(tokens),
        "window": options.window, "layers": order, "copying": scores.tolist(),
    }  # fmt: skip
    if options.output:
        write_json(options.output, result)
    return result


if __name__ == "__main__":
    main()
