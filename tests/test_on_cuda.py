"""What other files check on a CPU, on a GPU: memories, caches, stores, banks, models. Skipped without one."""

import pytest
import torch
from test_memory import CASES, INV_FREQ, make_schedule, make_tensors
from test_memory_patch import VARIANTS, logits, read, recall_cases, recall_model, tokens, with_memory
from tiny_models import tiny_config

from modeling_longnet import DilatedCache, LongNetForCausalLM, MemoryBank, dilated_attention, patch_model
from modeling_longnet.dilation_schedule import Heads
from modeling_longnet.memory_attention import MemoryCall, attend_memory, choose
from modeling_longnet.memory_reference import memory_attention_reference
from modeling_longnet.memory_search import Ranking
from modeling_longnet.triton_attention import FASTER_ON


pytestmark = pytest.mark.gpu
TOLERANCE = {"rtol": 0, "atol": 1e-4}
STORES = ["device", "cpu", "disk"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_memory_is_its_definition_with_its_gradients(name, dtype):
    """At the choice of the fast path: in lower precisions ranks may tie where the definition's do not."""
    floor = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    tensors = [x.detach().to("cuda", dtype).requires_grad_() for x in make_tensors(67)]
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    ranking, heads = Ranking(make_schedule(name), INV_FREQ.cuda()), Heads.of(*tensors[:2])
    call = MemoryCall(ranking, 0, heads, 0.4, "sdpa")
    chosen = choose(call, *tensors[:2])
    weights = torch.randn(2, 4, 67, 8, device="cuda", dtype=torch.float64)
    results = []
    for run, inputs in (
        (lambda *x: attend_memory(call, *x, chosen)[0], tensors),
        (lambda *x: _definition(call, chosen, *x), tensors),
        (lambda *x: _definition(call, chosen, *x), doubles),
    ):
        out = run(*inputs)
        results.append([out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)])
    fast, plain, exact = results
    for x, y, z in zip(fast, plain, exact, strict=True):
        error, allowed = (((t.double() - z).abs().max() / z.abs().max().clamp(min=1)).item() for t in (x, y))
        assert error <= max(floor, 2 * allowed if dtype == torch.bfloat16 else 0)


def _definition(call, chosen, *tensors):
    options = {"scale": call.scale, "inv_freq": INV_FREQ.to(tensors[0]), "chosen": chosen}
    return memory_attention_reference(*tensors, call.schedule, call.start, **options)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_with_a_memory_is_that_of_the_cpu(name):
    model, text = with_memory(name), tokens(150, batch=2)
    wanted = logits(model, text)
    torch.testing.assert_close(logits(model.cuda(), text.cuda()).cpu(), wanted, **TOLERANCE)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["beside-dilated", "clamped", "few-dimensions"])
def test_pieces_and_decoding_from_any_store_are_the_full_forward(name, store, tmp_path):
    model, text = with_memory(name).cuda(), tokens(131, batch=2).cuda()
    path = {"path": tmp_path / "pages"} if store == "disk" else {}
    cache = DilatedCache(model.config, store=store, **path)
    outs, cache = read(model, text, [50, 1, 1, 30, 7, 42], cache)
    torch.testing.assert_close(outs, logits(model, text), **TOLERANCE)
    if store != "device":
        assert cache.memory_by_place()[store] > 0


@pytest.mark.parametrize("store", STORES)
def test_a_bank_is_the_same_text_in_the_context(store, tmp_path):
    model, text, question = with_memory("clamped").cuda(), tokens(90), tokens(40).cuda()
    bank = MemoryBank.from_tokens(model, [text[0]], tmp_path / "bank", chunk_size=32, progress=False)
    path = {"path": tmp_path / "own"} if store == "disk" else {}
    outs, _ = read(model, question, [11, 1, 1, 27], bank.start_cache(model, store=store, **path))
    whole = logits(model, torch.cat([text.cuda(), question], dim=1))[:, 90:]
    torch.testing.assert_close(outs, whole, **TOLERANCE)


def test_a_model_finds_the_needle_in_half_precision():
    model, pairs, questions = recall_model()
    model = patch_model(model.to("cuda", torch.bfloat16), [32], [1], memory={"block_size": 4, "top_k": 8})
    texts, answers = recall_cases(pairs, questions)
    found = logits(model, texts.cuda())[:, -1].argmax(-1).cpu()
    assert (found == answers).float().mean() >= 0.75


def test_the_default_is_what_was_measured_to_be_faster():
    pytest.importorskip("triton")
    tensors = [torch.randn(1, 4, 2048, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    is_measured = torch.cuda.get_device_capability() in FASTER_ON
    wanted = dilated_attention(*tensors, [256, 1024], [1, 4], backend="triton" if is_measured else "sdpa")
    assert torch.equal(dilated_attention(*tensors, [256, 1024], [1, 4]), wanted)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_longnet_decodes_and_learns_as_on_the_cpu(backend):
    torch.manual_seed(0)
    model = LongNetForCausalLM(tiny_config(attn_implementation=backend)).eval()
    text = torch.randint(model.config.vocab_size, (2, 60))
    grads = []
    for device in ("cpu", "cuda"):
        model, text = model.to(device), text.to(device)
        model.zero_grad()
        model(text, labels=text).loss.backward()
        grads.append([p.grad.cpu().clone() for p in model.parameters()])  # a move takes gradients along
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    outs, _ = read(model, text, [20, 1, 1, 38])
    torch.testing.assert_close(outs, logits(model, text), **TOLERANCE)
