"""What keeps fewer activations changes no gradient, by the names that users look for; and what it computes again."""

import contextlib
import importlib
from functools import partial

import pytest
import torch
from tiny_models import tiny_config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_longnet import LongNetForCausalLM, patch_model


LAYERS = 2
OPERATOR = importlib.import_module("modeling_longnet.dilated_attention")  # hidden by the function of that name


def longnet():
    return LongNetForCausalLM(tiny_config(num_hidden_layers=LAYERS))


def patched():
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15,
    )  # fmt: skip
    return patch_model(LlamaForCausalLM(config), [8, 32], [1, 4])


def save_attention(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "longnet" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointing(model, **more):
    model.gradient_checkpointing_enable({"use_reentrant": False, **more})


def selective(model):
    checkpointing(model, context_fn=partial(create_selective_checkpoint_contexts, save_attention))


def selective_of_trl(model):
    pytest.importorskip("trl")
    models = pytest.importorskip("trl.models", reason="before TRL 1.16")
    models.enable_selective_activation_checkpointing(model)
    checkpointing(model)


def of_accelerate(model):
    """What FSDP2 under Accelerate does with `activation_checkpointing`: each layer is wrapped."""
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, GradientCheckpointingLayer))


def offloaded(model):
    return torch.autograd.graph.save_on_cpu()


def offloaded_by_trl(model):
    models = pytest.importorskip("trl.models")
    if not torch.accelerator.is_available():
        pytest.skip("TRL offloads from an accelerator alone")
    return models.get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False)


# How often the attention of each layer runs in a step.
WAYS = {checkpointing: 2, selective: 1, selective_of_trl: 1, of_accelerate: 2, offloaded: 1, offloaded_by_trl: 1}


@pytest.fixture
def step(monkeypatch):
    """A training step: gradients, and how often the operator ran forward."""
    runs, original = [], OPERATOR._run
    monkeypatch.setattr(OPERATOR, "_run", lambda *args: runs.append(args) or original(*args))

    def run(make, way=None, use_cache=False) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = make().train()
        around = (way and way(model)) or contextlib.nullcontext()
        input_ids = torch.randint(1, 61, (2, 50))
        runs.clear()
        with around:
            loss = model(input_ids, labels=input_ids, use_cache=use_cache).loss
        loss.backward()
        return [parameter.grad for parameter in model.parameters()], len(runs)

    return run


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [longnet, patched])
def test_keeping_fewer_activations_changes_no_gradient(step, make, way):
    expected, runs = step(make)
    found, again = step(make, way)
    assert (runs, again) == (LAYERS, WAYS[way] * LAYERS)
    for a, b in zip(found, expected):
        assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [longnet, patched])
def test_a_wrapped_layer_with_a_cache_fails_loudly(step, make):
    """Transformers sets caches aside for its own checkpointing alone; a layer that ran twice would have read twice."""
    with pytest.raises((ValueError, CheckpointError)):
        step(make, of_accelerate, use_cache=True)
