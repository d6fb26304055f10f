"""A small LongNet with a memory learns to recall what its schedule alone does not show it."""

import torch

from modeling_longnet import LongNetConfig, LongNetForCausalLM


NAMES, NUMBERS, FILLERS, ASKED = 8, 6, 8, 6
SHORT, LONG = 24, 120  # the first fits into the dense start of the schedule, the second does not
PAIRS, QUESTIONS, FILL = NUMBERS, NUMBERS + NAMES * NUMBERS, NUMBERS + NAMES * NUMBERS + NAMES


def make_model(memory: dict | None) -> LongNetForCausalLM:
    config = LongNetConfig(
        vocab_size=FILL + FILLERS, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        segment_lengths=[32, 128], dilation_rates=[1, 2], overlap="once", local="sliding", num_sink_tokens=1,
        position_embedding_type="none", max_position_embeddings=256, memory=memory, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LongNetForCausalLM(config)


def make_batch(count: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts in which each name is told a number once, among fillers, and then asked for; the numbers that are asked
    for; and how far from the text's end they were told: [count, length + ASKED], [count, ASKED], [count, ASKED]."""

    def shuffled(n, kept):
        return torch.rand(count, n, generator=generator).argsort(1)[:, :kept]

    numbers = torch.randint(0, NUMBERS, (count, NAMES), generator=generator)
    text = FILL + torch.randint(0, FILLERS, (count, length), generator=generator)
    places, asked = shuffled(length, NAMES), shuffled(NAMES, ASKED)
    text.scatter_(1, places, PAIRS + torch.arange(NAMES) * NUMBERS + numbers)
    return torch.cat([text, QUESTIONS + asked], dim=1), numbers.gather(1, asked), length - places.gather(1, asked)


def train(memory: dict | None) -> float:
    """The share of numbers told further back than a window that is recalled."""
    torch.manual_seed(0)
    model, generator = make_model(memory), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for length in [SHORT] * 200 + [LONG] * 30:
        input_ids, answers, _ = make_batch(32 if length == SHORT else 16, length, generator)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, length:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    input_ids, answers, distance = make_batch(128, LONG, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.eval()(input_ids=input_ids, use_cache=False).logits[:, LONG:].argmax(-1) == answers
    return found[distance > 40].float().mean().item()


def test_multi_key_recall_is_learned_with_a_memory_and_not_without():
    assert train({"block_size": 2, "top_k": 8}) > 0.9
    assert train(None) < 0.7  # of two heads, each sees every second token
