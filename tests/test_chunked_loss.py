"""The loss of the heads, chunk by chunk, is that over whole logits: value, gradients, and what counts for nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from modeling_longnet import LongNetForCausalLM, LongNetForMaskedLM, chunked_loss
from modeling_longnet.chunked_loss import chunked_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven rows of 61 words: chunks that do not divide the texts."""
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 7 * 61)


def whole(hidden, weight, targets, num_items=None, ignore_index=-100):
    reduction = "mean" if num_items is None else "sum"
    logits = torch.nn.functional.linear(hidden, weight).float()
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    return loss if num_items is None else loss / num_items


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(40)], ids=["mean", "17", "tensor"])
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_chunked_equals_whole(tokens, num_items, dtype):
    hidden = torch.randn(tokens, 32).to(dtype).requires_grad_()
    weight = torch.randn(61, 32).to(dtype).requires_grad_()
    targets = torch.randint(0, 61, (tokens,))
    targets[1::3] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].mT, targets, reduction="sum")
    expected = expected / ((targets >= 0).sum() if num_items is None else num_items)
    expected_grads = torch.autograd.grad(3 * expected, exact)
    errors = []
    for function in (chunked_cross_entropy, whole):
        loss = function(hidden, weight, targets, num_items)
        grads = torch.autograd.grad(3 * loss, (hidden, weight))
        assert [g.dtype for g in grads] == [dtype, dtype] and loss.dtype == torch.float32
        errors.append([(a.double() - b).abs().max().item() for a, b in
                       zip((loss, *grads), (expected.detach(), *expected_grads))])  # fmt: skip
    bound = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-3
    for ours, plain in zip(*errors):
        assert ours <= max(2 * plain, bound * float(expected.detach().abs().clamp(min=1)))


@pytest.mark.parametrize("is_autocast", [True, False])
def test_gradients_in_float16_do_not_vanish_under_a_scaled_loss(is_autocast):
    """As a `GradScaler` does it: probabilities of many words, over many tokens, are too small for float16 alone."""
    words, tokens, scale = 4000, 3000, 2**15
    targets = torch.randint(0, words, (tokens,))
    exact = [torch.randn(tokens, 32).double().requires_grad_(), (torch.randn(words, 32) / 20).double().requires_grad_()]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(exact[0] @ exact[1].mT, targets), exact)
    errors = []
    for function in (chunked_cross_entropy, whole):
        given = [x.detach().to(torch.float32 if is_autocast else torch.float16).requires_grad_() for x in exact]
        with torch.autocast("cpu", torch.float16, enabled=is_autocast):
            loss = function(*given, targets)
        grads = torch.autograd.grad(loss * scale, given)
        errors.append([((g.double() / scale - x).norm() / x.norm()).item() for g, x in zip(grads, expected)])
    for ours, plain in zip(*errors):
        assert ours <= 2 * plain < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_where_no_target_counts_gradients_are_zero(dtype):
    hidden, weight = (torch.randn(x, 32).to(dtype).requires_grad_() for x in (9, 61))
    loss = chunked_cross_entropy(hidden, weight, torch.full((9,), -100))
    assert loss.isnan() and not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))  # as whole logits do


def causal(**changes) -> LongNetForCausalLM:
    return LongNetForCausalLM(tiny_config(**changes)).train()


def masked() -> LongNetForMaskedLM:
    return LongNetForMaskedLM(tiny_config(is_causal=False, position_embedding_type="rope")).train()


@pytest.mark.parametrize("make", [causal, lambda: causal(tie_word_embeddings=False), masked],
                         ids=["causal", "untied", "masked"])  # fmt: skip
@pytest.mark.parametrize("told", [{}, {"num_items_in_batch": torch.tensor(90)}, {"shift_labels": True}],
                         ids=["mean", "num_items", "shifted"])  # fmt: skip
def test_a_model_trains_by_the_same_numbers(make, told):
    model, ids = make(), torch.randint(3, 61, (2, 45))
    labels = ids.clone()
    labels[0, :20] = -100
    if told.get("shift_labels"):
        told = {"shift_labels": torch.randint(3, 61, (2, 45))}
    results = []
    for skip in (None, False):
        model.zero_grad()
        out = model(ids, labels=labels, skip_logits=skip, **told)
        out.loss.backward()
        assert (out.logits is None) == (skip is None)
        results.append((out.loss.detach(), *(p.grad.clone() for p in model.parameters())))
    for chunked, plain in zip(*results):
        assert_close(chunked, plain, atol=1e-6, rtol=1e-5)


def test_logits_are_given_where_they_may_be_wanted():
    model, ids = causal(), torch.randint(3, 61, (2, 9))
    assert model(ids).logits is not None
    assert model(ids, labels=ids, skip_logits=False).logits.shape == (2, 9, 61)
    assert model.eval()(ids, labels=ids).logits is not None
    out = model(ids, shift_labels=ids)  # without others
    assert out.logits is not None
    assert_close(out.loss, model.train()(ids, shift_labels=ids).loss)
    out = model.eval()(ids, labels=ids, skip_logits=True)
    assert out.logits is None
    assert_close(out.loss, model(ids, labels=ids).loss)


def test_a_loss_of_ones_own_gets_whole_logits():
    model, ids = causal(), torch.randint(3, 61, (2, 9))
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean()
    out = model(ids, labels=ids)
    assert_close(out.loss, out.logits.square().mean())
    with pytest.raises(ValueError, match="skip_logits"):
        model(ids, labels=ids, skip_logits=True)


def test_a_head_that_is_more_than_its_weight_gets_whole_logits():
    peft = pytest.importorskip("peft")
    model, ids = causal(tie_word_embeddings=False), torch.randint(3, 61, (2, 9))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).train()
    out = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(out.loss, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_takes_the_steps_that_it_took_with_whole_logits(smoothing, tmp_path, monkeypatch):
    """`num_items_in_batch` over two micro-batches; label smoothing needs logits, and gets them."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 61, (8, 20)).tolist()]
    weights = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = causal()
        if plain:
            monkeypatch.setattr("modeling_longnet.chunked_loss.can_be_chunked", lambda *args: False)
        arguments = TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
            label_smoothing_factor=smoothing, optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_memory_does_not_hold_whole_logits():
    """A text of 4,096 tokens over 8,192 words: 128 MiB of logits, and chunks of 32."""
    code = """
import resource, sys, torch
from modeling_longnet.chunked_loss import chunked_cross_entropy
torch.manual_seed(0)
hidden, weight = torch.randn(4096, 16, requires_grad=True), torch.randn(8192, 16, requires_grad=True)
targets = torch.randint(0, 8192, (4096,))
chunked_cross_entropy(hidden[:8], weight, targets[:8]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chunked_cross_entropy(hidden, weight, targets).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200  # whole logits and their gradient are 256 MiB, beside float32 copies
