"""Forward-mode derivatives are right or refused: the fused kernels would drop a tangent and give zeros."""

import pytest
import torch
from tiny_models import tiny_config
from torch.autograd import forward_ad
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_longnet import (
    DilatedAttention,
    DilatedCache,
    LongNetForCausalLM,
    dilated_attention,
    dilated_attention_reference,
    patch_model,
)
from modeling_longnet.transformers_compat import named_cache


SCHEDULE = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


WAYS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x).flatten(x.dim()).sum(-1),
    "dual": dual,
    "compiled": lambda f, x: torch.compile(
        lambda y: torch.func.jvp(f, (y,), (torch.ones_like(y),))[1], backend="eager")(x),
}  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.mark.parametrize("name", ["jvp", "jacfwd", "dual"])
def test_eager_has_the_derivative_of_the_definition(name):
    x = torch.randn(1, 2, 20, 4, dtype=torch.float64)
    wanted = WAYS["jvp"](lambda x: dilated_attention_reference(x, x, x, **SCHEDULE), x)
    assert_close(WAYS[name](lambda x: dilated_attention(x, x, x, **SCHEDULE, backend="eager"), x), wanted)
    assert wanted.abs().max() > 0.1


@every_way
@pytest.mark.parametrize("place", range(3))
def test_kernels_refuse_a_tangent_of_any_of_their_tensors(way, place):
    x = torch.randn(1, 2, 20, 4)

    def attend(y):
        tensors = [x, x, x]
        tensors[place] = y
        return dilated_attention(*tensors, **SCHEDULE)

    with pytest.raises(Exception, match="backend='eager'"):
        way(attend, x)


def patched():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return patch_model(LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)), **SCHEDULE)


@pytest.mark.parametrize("make", [lambda: LongNetForCausalLM(tiny_config()), patched])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("earlier", [0, 9])
@pytest.mark.parametrize("new", [1, 7])
def test_models_refuse_it_on_every_path(make, bounded, earlier, new):
    model = make().eval()
    cache = DilatedCache(model.config) if bounded else None
    if earlier and bounded:
        with torch.no_grad():
            model(torch.arange(earlier)[None], use_cache=True, **named_cache(cache))

    def forward(x):
        return model(inputs_embeds=x, use_cache=bounded, **named_cache(cache)).logits

    with torch.no_grad(), pytest.raises(ValueError, match="forward-mode derivative"):
        WAYS["jvp"](forward, torch.randn(1, new, 32))


def test_a_layer_of_its_own_refuses_it():
    layer = DilatedAttention(16, 2, **SCHEDULE)
    with pytest.raises(ValueError, match="forward-mode"):
        WAYS["jvp"](layer, torch.randn(1, 20, 16))
    layer.backend = "eager"
    assert WAYS["jvp"](layer, torch.randn(1, 20, 16)).abs().max() > 0


def test_an_eager_longnet_has_it():
    model = LongNetForCausalLM(tiny_config(attn_implementation="eager")).eval().double()
    x, step = torch.randn(1, 20, 32, dtype=torch.float64), 1e-6

    def forward(x):
        return model(inputs_embeds=x, use_cache=False).logits

    found = WAYS["jvp"](forward, x)
    assert_close(found, (forward(x + step) - forward(x - step)) / (2 * step), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_each_its_own():
    x = torch.randn(3, 2, 20, 4)
    found = torch.func.vmap(lambda y: dilated_attention(y[None], y[None], y[None], **SCHEDULE)[0])(x)
    assert_close(found, dilated_attention(x, x, x, **SCHEDULE))
