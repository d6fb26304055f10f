"""No state is exactly zero where a gradient passes: there each LayerNorm would multiply it by 1 / sqrt(eps) = 316."""

import pytest
import torch
from tiny_models import tiny_config

from modeling_longnet import (
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForTokenClassification,
    LongNetModel,
)


PAD = 59


def gradient_norm(model: torch.nn.Module, loss: torch.Tensor) -> float:
    model.zero_grad()
    loss.backward()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


@pytest.mark.parametrize("changes", [{}, {"scale_embedding": False}, {"position_embedding_type": "none"}], ids=str)
def test_texts_may_begin_with_the_padding_token(changes):
    """GPT-2's convention: pad = bos = eos."""
    norms = []
    for pad in (None, PAD):
        torch.manual_seed(1)
        ids = {"bos_token_id": PAD, "eos_token_id": PAD, "pad_token_id": pad}
        model = LongNetForCausalLM(tiny_config(num_hidden_layers=4, **ids, **changes))
        assert model.model.embed_tokens.weight[PAD].any()
        x = torch.randint(3, 58, (8, 64))
        x[:, 0] = PAD
        norms.append(gradient_norm(model, model(input_ids=x, labels=x).loss))
    assert norms[0] == norms[1] < 10


def padded_batch(model) -> dict:
    x, mask = torch.randint(3, 58, (4, 32)), torch.ones(4, 32, dtype=torch.long)
    for row, length in enumerate((32, 20, 7, 1)):
        mask[row, length:] = 0
    return {"input_ids": x.masked_fill(mask == 0, PAD), "attention_mask": mask}


@pytest.mark.parametrize("side", ["right", "left", "between"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_gradient_passes_through_padded_rows(side, checkpointed):
    """Even with states of zeros, as the padding row of a converted checkpoint or padded `inputs_embeds` give."""
    model = LongNetModel(tiny_config(num_hidden_layers=8, position_embedding_type="rope"))
    batch = padded_batch(model)
    mask = batch["attention_mask"]
    mask = {"left": mask.flip(1), "right": mask, "between": mask.roll(11, 1)}[side]
    embeds = model.embed_tokens(batch["input_ids"]).detach() * mask[..., None]
    embeds.requires_grad_(True)
    if checkpointed:
        model.gradient_checkpointing_enable()
        model.train()
    out = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    weight = torch.randn_like(out)

    def gradients(weight):
        model.zero_grad()
        embeds.grad = None
        (out * weight).sum().backward(retain_graph=True)
        return [embeds.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    found, wanted = gradients(weight), gradients(weight * mask[..., None])
    assert not found[0][mask == 0].any()
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)
    assert found[0].norm() < 1e4


@pytest.mark.parametrize("head", [LongNetForQuestionAnswering, LongNetForTokenClassification])
def test_heads_that_look_at_padded_rows_have_a_gradient(head):
    for pad in (None, PAD):
        model = head(tiny_config(num_hidden_layers=8, pad_token_id=pad))
        model.model.embed_tokens.weight.data[PAD] = 0
        output = model(**padded_batch(model))
        loss = sum(x.float().sum() for x in (output.logits if "logits" in output else output.to_tuple()))
        assert gradient_norm(model, loss) < 1e4


def test_question_answering_learns_on_padded_batches():
    """Find the one token that marks the answer."""
    model = LongNetForQuestionAnswering(tiny_config(num_hidden_layers=4, pad_token_id=PAD))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        batch = padded_batch(model)
        last = batch["attention_mask"].sum(1)
        at = (torch.rand(4) * last).long()
        batch["input_ids"][torch.arange(4), at] = 1
        loss = model(**batch, start_positions=at, end_positions=at).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 0.5
