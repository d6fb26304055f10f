"""What every process of `torchrun` runs for test_sequence_parallel.py: `sequence_parallel_worker.py RESULT CHECK...`.

Each check compares with a single process, which is this process on whole texts. Rank 0 writes what was measured.
"""

import copy
import dataclasses
import functools
import json
import pickle
import random
import sys

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    dilated_attention,
    dilated_attention_reference,
    sequence_exchange,
    sequence_shards,
)
from modeling_longnet.attention_kernels import get_kernel
from modeling_longnet.dilated_attention import find_runs
from modeling_longnet.dilation_schedule import DilationSchedule
from modeling_longnet.patching import patch_model
from modeling_longnet.sequence_exchange import Heads, Slices, plan_exchange, sharded_attention
from modeling_longnet.sequence_parallel import SequenceParallel
from modeling_longnet.transformers_compat import named_cache


VOCABULARY = 61


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def per_token_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
    """The library's causal loss in the dtype of the logits: its own is computed in float32 whatever they are."""
    if shift_labels is None:
        shift_labels = pad(labels[:, 1:], (0, 1), value=-100)
    total = cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (num_items_in_batch or (shift_labels != -100).sum())


# The operator


def random_schedule(chance: random.Random) -> DilationSchedule:
    is_causal = chance.random() < 0.6
    lengths = sorted(chance.choice([2, 3, 4, 6, 8, 12, 16, 20, 32, 48]) for _ in range(chance.randint(1, 4)))
    rates = sorted(min(chance.randint(1, 4), w) for w in lengths)
    local, overlap, sinks = "segment", chance.choice(["count", "once"]), chance.choice([0, 0, 3])
    if is_causal and chance.random() < 0.4:
        local, rates[0] = "sliding", 1
    padding = "zeros" if not is_causal and overlap == "count" and not sinks and chance.random() < 0.4 else "mask"
    offsets = chance.choice(["modulo", "contiguous"])
    return DilationSchedule(tuple(lengths), tuple(rates), is_causal, offsets, overlap, sinks, padding, local)


def operator_error(chance: random.Random, dtype: torch.dtype) -> float:
    """Largest error of outputs and gradients of one random case, against the definition on the whole text."""
    rank, size = dist.get_rank(), dist.get_world_size()
    schedule, batch, heads = random_schedule(chance), chance.randint(1, 2), chance.choice([2, 4, 6])
    kv_heads, n, width = chance.choice([g for g in (1, 2, heads) if heads % g == 0]), chance.randint(1, 20), 4
    length = n * size - chance.randint(0, min(n, size) - 1)
    generator = torch.Generator().manual_seed(chance.randint(0, 2**31))
    ids = None
    if chance.random() < 0.5:
        ids = torch.randint(-1, 3, (batch, length), generator=generator).sort(1).values
    shapes = [(batch, h, length, width) for h in (heads, kv_heads, kv_heads, heads)]
    *inputs, grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    inputs = [x.requires_grad_() for x in inputs]
    wanted = dilated_attention_reference(*inputs, **schedule.as_arguments(), document_ids=ids)
    wanted = [wanted, *torch.autograd.grad(wanted, inputs, grad)]

    def own(x):
        x = pad(x.detach(), (0, 0, 0, n * size - length))[:, :, rank * n : (rank + 1) * n]
        return x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # strides as in a model

    runs = tuple((rows.start, rows.stop, *run) for rows, *run in find_runs(ids, batch, length))
    slices = Slices(batch, n, size, runs)
    exchange = plan_exchange(slices, rank, schedule, Heads(heads, kv_heads))
    slices = [own(x).requires_grad_() for x in inputs]
    kernel = get_kernel("sdpa", slices[0])
    got = sharded_attention(*slices, exchange, dist.group.WORLD, width**-0.5, kernel)
    got = [got, *torch.autograd.grad(got, slices, own(grad))]
    return max((own(w).double() - g.double()).abs().max().item() for w, g in zip(wanted, got))


def check_operator() -> dict:
    cases = 120 // dist.get_world_size()
    chance = random.Random(dist.get_world_size())
    return {str(dtype): max(operator_error(chance, dtype) for _ in range(cases)) for dtype in
            (torch.float64, torch.float32)}  # fmt: skip


# Models


def longnet(cls=LongNetForCausalLM, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    defaults = dict(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, segment_lengths=[8, 16, 64], dilation_rates=[1, 2, 4], pad_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return cls(LongNetConfig(**defaults | settings)).to(dtype)


def patched_llama(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    defaults = dict(segment_lengths=[8, 16, 64], dilation_rates=[1, 2, 4], local="segment")
    return patch_model(LlamaForCausalLM(config), **defaults | settings).to(dtype)


def patched_gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0, resid_pdrop=0,
        embd_pdrop=0,
    )  # fmt: skip
    return patch_model(GPT2LMHeadModel(config), [8, 16, 64], [1, 2, 4]).to(dtype)


MODELS = {
    "longnet xpos": longnet,
    "longnet rope gqa once": lambda: longnet(
        position_embedding_type="rope", num_key_value_heads=2, overlap="once", num_sink_tokens=3
    ),
    "longnet learned": lambda: longnet(position_embedding_type="learned", head_offsets="contiguous"),
    "longnet xpos not nested": lambda: longnet(segment_lengths=[6, 10, 32], dilation_rates=[1, 2, 3]),
    "longnet bidirectional": lambda: longnet(LongNetForMaskedLM, is_causal=False),
    "longnet zeros": lambda: longnet(LongNetForMaskedLM, is_causal=False, padding="zeros"),
    "patched llama": patched_llama,
    "patched gpt2": patched_gpt2,
    "patched llama sliding": lambda: patched_llama(local="sliding"),
}


def texts(kind: str, length: int = 45) -> dict[str, torch.Tensor]:
    """A batch of two: plain, padded on a side, packed, or with targets at the very end only."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2, length))
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    if kind == "left":
        mask[0, :13] = 0
    if kind == "right":
        mask[0, -17:] = 0
    if kind in ("left", "right"):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
        batch["position_ids"] = positions
    if kind == "packed":
        del batch["attention_mask"]
        batch["position_ids"] = torch.stack([torch.arange(length), torch.arange(length) - 19])
        batch["position_ids"][1, :19] += 19
    if kind == "few targets":  # none on the first rank
        batch["labels"][:, : length - 3] = -100
    return batch


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(got: dict, wanted: dict) -> float:
    """The largest relative error of a parameter's gradient. One that is zero but for rounding is measured by others."""
    floor = 1e-3 * max(g.abs().max() for g in wanted.values())
    return max(((got[n] - g).abs().max() / g.abs().max().clamp(min=floor)).item() for n, g in wanted.items())


def whole_run(model, sp, batch, is_causal_lm):
    """Logits, loss and gradients of the single process."""
    model.zero_grad()
    with sp.disabled():
        out = model(**batch, **({} if is_causal_lm else {"shift_labels": batch["labels"]}))
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), gradients(model)


def sharded_run(model, sp, batch, is_causal_lm):
    """The same of all ranks together, the gradients as DDP averages them."""
    model.zero_grad()
    shard = sp.collator(lambda x: x, shift_labels=is_causal_lm)(batch)
    extra = {} if is_causal_lm else {"shift_labels": shard["labels"]}
    out = model(**shard, **extra)
    out.loss.backward()
    got = gradients(model)
    loss = out.loss.detach().clone()
    for x in (loss, *got.values()):
        dist.all_reduce(x, group=sp.group)
        x /= sp.size
    return sp.gather_sequence(out.logits.detach()), loss, got


def model_errors(name: str, kind: str, sp, prepare=lambda model: None) -> dict[str, float]:
    model = MODELS[name]()
    model.loss_function = per_token_loss
    is_causal_lm = "bidirectional" not in name and "zeros" not in name
    sp.add_hooks(model)
    prepare(model)
    batch = texts(kind)
    wanted, got = (run(model, sp, batch, is_causal_lm) for run in (whole_run, sharded_run))
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert wanted[2].keys() == got[2].keys(), "a parameter without gradient"
    return {
        "logits": relative_error(got[0][real], wanted[0][real]),
        "loss": relative_error(got[1], wanted[1]),
        "gradients": gradient_error(got[2], wanted[2]),
    }


KINDS = ("plain", "left", "right", "packed", "few targets")


def check_models() -> dict:
    sp = SequenceParallel(None, dist.get_world_size())
    pairs = [(name, kind) for name in MODELS for kind in KINDS]
    if sp.size > 2:  # each model once, with changing kinds
        pairs = [(name, KINDS[index % len(KINDS)]) for index, name in enumerate(MODELS)]
    return {f"{name}, {kind}": model_errors(name, kind, sp) for name, kind in pairs}


# The tests of the tests: each planted bug must show


def _lost_gradients(original, rows, *args):
    """The rows that other ranks received keep their gradients to themselves."""
    received, work = original(rows, *args)
    work.wait()
    in_backward = torch._C._current_graph_task_id() != -1
    return (received * 0 if in_backward else received), work


def _no_own_keys(original, *args):
    """The bug of torchscale's causal version: a rank sees what others sent, and not its own keys."""
    pieces = list(original(*args))
    return [piece for piece in pieces if not piece[1]] or pieces


def _rows_of_another(original, rows, *args):
    received, work = original(rows, *args)
    work.wait()
    return received.flip(0), work


def _places(change):
    def mutated(original, *args):
        place = original(*args)
        change(place)
        return place

    return mutated


def _local_positions(place):
    place.position_ids = place.position_ids - place.position_ids[:, :1]


def _local_document_positions(place):
    place.document_positions = place.document_positions - place.document_positions[:, :1]


def _padding_is_seen(place):
    slices = place.slices
    whole = (0, slices.batch, 0, slices.size * slices.slice_length)
    place.slices = dataclasses.replace(slices, documents=(whole,))


def _cut_before_shift(original, self, batch):
    """Each slice's last token has no target."""
    targets = original(self, batch)
    n = -(-targets["labels"].shape[1] // self.size)
    targets["labels"] = targets["shift_labels"] = targets["labels"].clone()
    targets["labels"][:, n - 1 :: n] = -100
    return targets


def _own_targets(original, self, batch):
    """Each rank divides by the number of its own targets."""
    targets = original(self, batch)
    n = -(-targets["labels"].shape[1] // self.size)
    own = targets["labels"][:, self.rank * n :][:, :n]
    return targets | {"num_items_in_batch": max(1, int((own != -100).sum()))}


def _slices_out_of_order(original, self, x, value=0):
    turned = dataclasses.replace(self, rank=self.size - 1 - self.rank) if x.dtype == torch.long else self
    return original(turned, x, value)


MUTATIONS = {
    "gradients do not travel back": (sequence_exchange, "send_rows", _lost_gradients, "longnet xpos", "plain"),
    "own keys are left out": (sequence_exchange, "split_block", _no_own_keys, "longnet xpos", "plain"),
    "rows in the wrong order": (sequence_exchange, "send_rows", _rows_of_another, "patched llama", "plain"),
    "position ids of the slice": (sequence_shards, "_place", _places(_local_positions), "patched llama", "plain"),
    "xpos of the slice": (sequence_shards, "_place", _places(_local_document_positions), "longnet xpos", "plain"),
    "padding is seen": (sequence_shards, "_place", _places(_padding_is_seen), "patched llama", "left"),
    "labels are cut before they are shifted": (
        sequence_shards.ShardingCollator, "_targets", _cut_before_shift, "longnet xpos", "plain"),
    "each rank divides by its own targets": (
        sequence_shards.ShardingCollator, "_targets", _own_targets, "longnet xpos", "few targets"),
    "slices out of order": (sequence_shards.Shard, "cut", _slices_out_of_order, "longnet xpos", "plain"),
}  # fmt: skip


def check_mutations() -> dict:
    sp = SequenceParallel(None, dist.get_world_size())
    result = {}
    for mutation, (owner, attribute, mutated, name, kind) in MUTATIONS.items():
        original = getattr(owner, attribute)
        plan_exchange.cache_clear()
        setattr(owner, attribute, functools.partialmethod(functools.partial(_call, mutated, original))
                if isinstance(owner, type) else functools.partial(mutated, original))  # fmt: skip
        try:
            result[mutation] = model_errors(name, kind, sp)
        finally:
            setattr(owner, attribute, original)
            plan_exchange.cache_clear()
    return result


def _call(mutated, original, self, *args, **kwargs):
    return mutated(original, self, *args, **kwargs)


def check_head_split() -> dict:
    """DeepSpeed Ulysses: each rank gets all tokens of some heads, and must count offsets by their global index."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    heads = 2 * size
    query, key, value = (torch.randn(1, heads, 40, 4, dtype=torch.float64) for _ in range(3))
    own = slice(2 * rank, 2 * rank + 2)
    result = {}
    for offsets in ("modulo", "contiguous"):
        schedule = dict(segment_lengths=[8, 40], dilation_rates=[1, 4], head_offsets=offsets)
        wanted = dilated_attention(query, key, value, **schedule)[:, own]
        for said, extra in ("", dict(head_index_offset=2 * rank, total_num_heads=heads)), (" not told", {}):
            got = dilated_attention(query[:, own], key[:, own], value[:, own], **schedule, **extra)
            error = (got - wanted).abs().max()
            dist.all_reduce(error, op=dist.ReduceOp.MAX)
            result[offsets + said] = error.item()
    return result


def check_collectives() -> dict:
    """Calls of the collective in a forward and backward, per layer; none where every segment lies in a slice."""
    sp = SequenceParallel(None, dist.get_world_size())
    calls, original = [], sequence_exchange.send_rows
    counted = {}
    n = 48 // dist.get_world_size()
    for name, lengths in ("spanning", [8, 48]), ("local", [n // 2, n]):
        model = longnet(segment_lengths=lengths, dilation_rates=[1, 2])
        sp.add_hooks(model)
        calls.clear()
        sequence_exchange.send_rows = lambda *args: calls.append(args) or original(*args)
        shard = sp.collator(lambda x: x)(texts("plain", 48))
        loss = model(**shard).loss
        counted[f"{name}, forward"] = len(calls)
        loss.backward()
        counted[f"{name}, with backward"] = len(calls)
        sequence_exchange.send_rows = original
    counted["report"] = sp.report()
    return counted


def _raises(run, message: str) -> bool:
    try:
        run()
    except ValueError as error:
        return message in str(error)
    return False


def check_guards() -> dict:
    """What must not run on: batches of different texts, forwards without the collator, copies, another slices."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sp = SequenceParallel(None, size)
    model = longnet(dtype=torch.float32)
    sp.add_hooks(model)
    sp.add_hooks(model)  # once is enough
    batch = texts("plain")
    shard = sp.collator(lambda x: x)(batch)
    different = sp.collator(lambda x: x)(batch | {"input_ids": (batch["input_ids"] + rank) % VOCABULARY})
    result = {
        "different texts": _raises(lambda: model(**different), "slices of the same texts"),
        "whole texts": _raises(lambda: model(**batch), "was not cut"),
        "padding inside": _raises(lambda: model(**sp.collator(lambda x: x)(
            batch | {"attention_mask": torch.ones_like(batch["input_ids"]).index_fill(1, torch.tensor([9]), 0)}
        )), "between the tokens"),
        "not shifted": _raises(
            lambda: model(**sp.collator(lambda x: x, shift_labels=False)(batch)), "`shift_labels` of"),
        "cache": _raises(lambda: model(**shard, **named_cache(DynamicCache())), "generate under"),
        "size": _raises(lambda: SequenceParallel(None, size + 1), "divide the number of processes"),
    }  # fmt: skip
    with torch.no_grad():
        wanted = model(**shard, skip_logits=False).logits
        result["a copy"] = torch.equal(copy.deepcopy(model)(**shard, skip_logits=False).logits, wanted)
        unpickled = pickle.loads(pickle.dumps(model))
        with sp.disabled():
            whole = model(batch["input_ids"]).logits
            result["shard while disabled"] = _raises(lambda: model(**shard), "wants whole ones")
            generated = model.generate(batch["input_ids"][:, :9], max_new_tokens=3, do_sample=False)
            result["generation"] = generated.shape == (2, 12)
        result["a pickled copy runs on whole texts"] = torch.equal(unpickled(batch["input_ids"]).logits, whole)
        result["gathered"] = torch.allclose(sp.gather_sequence(wanted), whole, atol=1e-5)
    # Two forwards before their backwards: the recomputation of each finds its own batch.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    longer = sp.collator(lambda x: x)(texts("plain", 61))
    (model(**shard).loss + model(**longer).loss).backward()
    both = gradients(model)
    model.zero_grad()
    for x in (longer, shard):
        model(**x).loss.backward()
    result["two forwards, then backwards"] = gradient_error(both, gradients(model)) < 1e-5
    x = torch.ones(1, 3, 2, requires_grad=True)
    (sp.gather_sequence(x, 3 * size) * (rank + 1)).sum().backward()
    result["gradient of a gather"] = torch.equal(x.grad, torch.full_like(x, size * (size + 1) / 2))
    return result


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def main(result_file: str, *names: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    result = {"world_size": dist.get_world_size()}
    for name in names:
        result[name] = CHECKS[name]()
    if dist.get_rank() == 0:
        with open(result_file, "w") as file:
            json.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
