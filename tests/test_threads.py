"""Threads do not meet: what a forward needs is in its model, its arguments or its tensors, never in a module."""

import ast
import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_config
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_longnet import LongNetForCausalLM, patch_model, unpatch_model
from modeling_longnet.sequence_parallel import SequenceParallel
from modeling_longnet.streaming import stream_loss


PACKAGE = Path(__file__).parent.parent / "modeling_longnet"
# Functions that change an object in place.
MUTATORS = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def changed_names(tree: ast.Module) -> set[str]:
    """Names of which some function changes the object: `x[...] = `, `x.y = `, `x.append(...)`, `global x`."""
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.Lambda)):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                found |= set(node.names)
            elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
                found.add(ast.unparse(node.value))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                found.add(ast.unparse(node.func.value))
    return found


def module_names(tree: ast.Module) -> set[str]:
    """What a module binds, or imports from another one of ours, outside functions and classes."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_function_changes_what_belongs_to_a_module(path):
    """Caches of pure functions (`lru_cache`), keyed by all that they depend on, are the only state of a module."""
    tree = ast.parse(path.read_text())
    assert not changed_names(tree) & module_names(tree)


@pytest.mark.parametrize("code", [
    "x = []\ndef f(): x.append(1)", "x = {}\ndef f(): x[0] = 1", "x = None\ndef f():\n    global x\n    x = 1",
    "from .y import x\ndef f(): x.z = 1", "x: dict = {}\nf = lambda: x.update(y=1)",
])  # fmt: skip
def test_such_a_change_would_be_seen(code):
    tree = ast.parse(code)
    assert changed_names(tree) & module_names(tree)


def llama(seed: int = 0, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=61, max_position_embeddings=128, initializer_range=0.3, **sizes, **settings)
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128)).eval()


@contextlib.contextmanager
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def answers_while(model, work, seconds_at_least: int = 12) -> None:
    """Serves `model` in other threads, prefilled, padded, cached and packed, while `work()` runs in this one."""
    x = torch.randint(0, 61, (2, 50), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(x)
    mask[1, :20] = 0
    positions = torch.cat([torch.arange(30), torch.arange(20)])[None].expand(2, -1)

    @torch.no_grad()
    def serve():
        return [
            model(input_ids=x).logits,
            model(input_ids=x, attention_mask=mask).logits[mask.bool()],
            model(input_ids=x, position_ids=positions).logits,
            model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0),
        ]

    wanted, done = serve(), threading.Event()

    def serve_on():
        count = 0
        while count < seconds_at_least or not done.is_set():
            for found, right in zip(serve(), wanted, strict=True):
                assert_close(found, right)
            count += 1

    with ThreadPoolExecutor(2) as pool, switching_often():
        servers = [pool.submit(serve_on) for _ in range(2)]
        try:
            work()
        finally:
            done.set()
        for server in servers:
            server.result()


def models():
    return {"patched": patch_model(llama(), [8, 32], [1, 4]), "longnet": LongNetForCausalLM(tiny_config()).eval()}


@pytest.mark.parametrize("served", ["patched", "longnet"])
def test_serving_beside_patching_streaming_and_generating(served):
    text = torch.randint(1, 61, (120,))

    def work():
        wanted = None
        for _ in range(6):
            model = patch_model(llama(7), [8, 32], [1, 4])
            assert model.dilated_attention_report.layers == (0, 1)
            logits = model(input_ids=text[None]).logits
            loss = stream_loss(model, text, chunk_size=17, progress=False).loss
            tokens = model.generate(text[None, :30], max_new_tokens=5, do_sample=False, pad_token_id=0)
            wanted = wanted or (logits, loss, tokens)
            assert_close((logits, loss, tokens), wanted)
            unpatch_model(model)

    answers_while(models()[served], work)


@pytest.mark.parametrize("served", ["patched", "longnet"])
def test_serving_beside_sequence_parallel_hooks(served):
    trained = LongNetForCausalLM(tiny_config(attn_implementation="sdpa"))
    sp = SequenceParallel(None, 1)
    sp.add_hooks(trained)
    batch = sp.collator()([{"input_ids": torch.arange(40), "labels": torch.arange(40)} for _ in range(2)])
    with sp.disabled():
        wanted = trained(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss

    def work():
        for _ in range(30):
            loss = trained(**batch).loss
            loss.backward()
            assert_close(loss, wanted)

    assert not dist.is_initialized()
    answers_while(models()[served], work)


def test_patching_in_many_threads_at_once():
    def patched(seed):
        model = patch_model(llama(0), [8, 32], [1, 4])
        with torch.no_grad():
            return model(input_ids=torch.arange(50)[None]).logits, model.dilated_attention_report.layers

    wanted = patched(0)
    with ThreadPoolExecutor(4) as pool, switching_often():
        for found in pool.map(patched, range(12)):
            assert found[1] == wanted[1] == (0, 1)


@pytest.mark.parametrize("stage", [
    "probe_attention", "find_layers", "choose_layers", "guard_learned_positions", "scale_rotary_embeddings",
    "_mark_scaled", "_set_instance_attributes", "AdapterRecord", "make_report",
])  # fmt: skip
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_patch_that_fails_leaves_the_model_as_it_was(stage, error, make, monkeypatch):
    import modeling_longnet.patching as patching

    model = make()
    x = torch.arange(50)[None]
    wanted, modules = model(input_ids=x).logits, dict(model.named_modules())
    attributes, config = set(vars(model)), model.config.to_dict()

    def fail(*args, **kwargs):
        if not returns_undo:
            original(*args, **kwargs)
        raise error("planted")

    original, returns_undo = getattr(patching, stage), stage in ("guard_learned_positions", "scale_rotary_embeddings")
    monkeypatch.setattr(patching, stage, fail)
    scaling = {"rope_type": "yarn", "factor": 4.0} if make is llama else None
    with pytest.raises(error, match="planted"):
        patch_model(model, [8, 32], [1, 4], rope_scaling=scaling)
    assert set(vars(model)) - attributes <= {"model_tags"} and model.model_tags is None
    assert model.config.to_dict() == config and dict(model.named_modules()) == modules
    assert torch.equal(model(input_ids=x).logits, wanted)
    monkeypatch.undo()
    patch_model(model, [8, 32], [1, 4])
