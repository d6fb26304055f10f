"""Systems that Transformers has, as it has them: Llama, RWKV-4, Mamba, Mamba-2, Griffin; and Llama with our patch.

Transformers runs three of them, without their GPU kernels, in a loop over tokens that writes by index. Here that one
function is exchanged for a chunked scan with the same outputs and gradients; nothing else of the model is.

Letters: B batch, N tokens, E channels, S state size.
"""

import contextlib
import functools
import inspect
import math
from unittest import mock

import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.models.mamba import modeling_mamba
from transformers.models.rwkv import modeling_rwkv

from modeling_longnet import DilatedCache, is_patched, patch_model, unpatch_model

from .backbone import ModelShape, System
from .recurrence import linear_recurrence


CACHE_NAMES = "cache", "cache_params", "past_key_values", "state"  # by release and model


class TransformersSystem(System):
    """A causal language model of Transformers.

    Args:
        replace: the module and the name of a function of it that runs otherwise inside this model's forwards, and what
        runs.
    """

    def __init__(self, model: PreTrainedModel, replace: tuple | None = None):
        super().__init__()
        self.model, self.replace = model, replace
        parameters = inspect.signature(model.base_model.forward).parameters
        self.cache_name = next(name for name in CACHE_NAMES if name in parameters)

    def embed(self, input_ids):
        return self.model.get_input_embeddings()(input_ids)

    def _new_cache(self):
        if self.cache_name == "state":
            return None
        return DilatedCache(self.model.config) if is_patched(self.model) else DynamicCache(config=self.model.config)

    def body(self, hidden_states, state=None, keep_state=False):
        cache = {}
        if keep_state or state is not None:
            state = self._new_cache() if state is None else state
            cache = {self.cache_name: state}
        replaced = mock.patch.object(*self.replace) if self.replace else contextlib.nullcontext()
        with replaced:
            outputs = self.model.base_model(inputs_embeds=hidden_states, use_cache=bool(cache), **cache)
        if self.cache_name == "state":  # RWKV's is a new one each time; caches are filled in place
            state = outputs.state
        return outputs.last_hidden_state, state if keep_state else None

    def head(self, hidden_states):
        scores = self.model.get_output_embeddings()(hidden_states)
        cap = getattr(self.model.config, "logits_soft_cap", None)
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def embedding_weight(self):
        return self.model.get_input_embeddings().weight


class AttachedMemory(TransformersSystem):
    """A model that is trained under one patch, and reads under another, as it is.

    Args:
        in_training, in_reading: arguments of `patch_model`.
    """

    def __init__(self, model: PreTrainedModel, in_training: dict, in_reading: dict):
        super().__init__(patch_model(model, **in_training))
        self.patches = {True: in_training, False: in_reading}

    def train(self, mode: bool = True):
        if mode != self.training:
            patch_model(unpatch_model(self.model), **self.patches[mode])
        return super().train(mode)


def llama(shape: ModelShape, width: int, patch: dict | None = None, in_reading: dict | None = None) -> System:
    """Dense, or with `patch_model(**patch)`, of which `in_reading` takes the place where it is not trained."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=width,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            max_position_embeddings=64 * shape.max_length,  # at least a schedule's reach
            tie_word_embeddings=True,
        )
    )
    if in_reading is not None:
        return AttachedMemory(model, patch, in_reading)
    return TransformersSystem(model if patch is None else patch_model(model, **patch))


def chunked_wkv(time_decay, time_first, key, value, state=None, return_state=False):
    """RWKV-4's weighted sum of values [B, N, E], as `rwkv_linear_attention_cpu`; equation 19 of arXiv 2305.13048.

    wkv_t = (A_{t-1} + e^{u + k_t} v_t) / (B_{t-1} + e^{u + k_t}) with A and B decaying by e^{-w} per token, both
    kept as multiples of e^{m_t}, m_t the largest exponent in them, as the loop keeps them. The state is A, B and m,
    each [B, E].
    """
    decay, length = -time_decay.exp(), key.shape[1]
    if state is None:
        before, initial = key[:, 0].detach().double(), key.new_zeros(*key[:, 0].shape, 2)
    else:
        before, initial = state[2].double(), torch.stack(state[:2], -1).to(key.dtype)
    with torch.no_grad():
        fallen = decay.double() * torch.arange(length + 1, device=key.device)[:, None]
        exponents = torch.cat([before[:, None], key.double()], 1)
        largest = (exponents - fallen).cummax(1).values + fallen  # m_t, from before the first token on
        top = torch.maximum(largest[:, :-1], key.double() + time_first)
    falls = (decay + (largest[:, :-1] - largest[:, 1:]).to(key.dtype)).exp()
    weight = (key - largest[:, 1:].to(key.dtype)).exp()
    sums = torch.stack([weight * value, weight], -1)
    states = linear_recurrence(falls[..., None].expand_as(sums), sums, initial)
    earlier = torch.cat([initial[:, None], states[:, :-1]], 1) * (largest[:, :-1] - top).to(key.dtype).exp()[..., None]
    bonus = (key + time_first - top.to(key.dtype)).exp()
    output = (earlier[..., 0] + bonus * value) / (earlier[..., 1] + bonus)
    if return_state or state is not None:
        state = [states[:, -1, :, 0].clone(), states[:, -1, :, 1].clone(), largest[:, -1].to(key.dtype)]
    return output, state


def rwkv(shape: ModelShape, width: int) -> TransformersSystem:
    """RWKV-4, started as its authors' code does: bonus log 0.3 + zigzag, five matrices at zero."""
    config = RwkvConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        intermediate_size=width,
        context_length=shape.max_length,
        rescale_every=0,
        tie_word_embeddings=True,
    )
    model = RwkvForCausalLM(config)
    with torch.no_grad():
        nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
        for block in model.rwkv.blocks:
            zigzag = (torch.arange(shape.hidden_size) + 1) % 3 - 1
            block.attention.time_first.copy_(math.log(0.3) + 0.5 * zigzag)
            for linear in (block.attention.key, block.attention.receptance, block.attention.output):
                linear.weight.zero_()
            for linear in (block.feed_forward.value, block.feed_forward.receptance):
                linear.weight.zero_()
    return TransformersSystem(model, (modeling_rwkv, "rwkv_linear_attention", chunked_wkv))


def chunked_selective_scan(
    hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **unused
):
    """Mamba's selective scan, as `mamba_selective_scan`; algorithm 2 of arXiv 2312.00752. Hidden states [B, E, N].

    Without gradients the text is read in pieces, whose [B, N, E, S] tensors would fill the memory at once.
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = nn.functional.softplus(dt)
    piece = hidden_states.shape[-1] if torch.is_grad_enabled() else 2048
    state, outputs = None, []
    pieces = (t.split(piece, -1) for t in (hidden_states, dt, B, C))
    for part, step, into, out in zip(*pieces):
        step, part = step.mT[..., None], part.mT  # [B, N, E, 1], [B, N, E]
        states = linear_recurrence((A * step).exp(), step * into.mT[:, :, None] * part[..., None], state)
        outputs.append((states @ out.mT[..., None])[..., 0])
        state = states[:, -1]
    output = torch.cat(outputs, 1).mT
    if D is not None:
        output = output + hidden_states * D[:, None]
    if z is not None:
        output = output * nn.functional.silu(z)
    output = output.to(hidden_states.dtype)
    return (output, state.clone()) if return_last_state else output


def mamba(shape: ModelShape, width: int) -> TransformersSystem:
    """Two blocks per layer of the others, of inner width `width`."""
    config = MambaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=2 * shape.num_hidden_layers,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
    )
    config.intermediate_size = width
    model = MambaForCausalLM(config)
    return TransformersSystem(model, (modeling_mamba, "mamba_selective_scan", chunked_selective_scan))


def mamba2(shape: ModelShape, width: int) -> TransformersSystem:
    """Two blocks per layer of the others, with `width` heads of E / 8 channels and a state of 64 for each."""
    head = shape.hidden_size // 8
    config = Mamba2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=2 * shape.num_hidden_layers,
        expand=1,
        num_heads=shape.hidden_size // head,
        head_dim=head,
        state_size=64,
        n_groups=1,
        chunk_size=64,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
    )
    config.num_heads = width
    vars(config)["expand"] = width * head / shape.hidden_size  # the class wants a whole number, the model does not
    return TransformersSystem(Mamba2ForCausalLM(config))


def _scan_states(module, hidden_states, recurrent_gate, reset, recurrent_states, acc_dtype=torch.float32):
    """`RecurrentGemmaRglru._rnn_scan` by the chunked scan."""
    decay = (recurrent_gate * ~reset).to(acc_dtype)
    states = linear_recurrence(decay, hidden_states.to(acc_dtype), recurrent_states)
    return states.to(hidden_states.dtype), states[:, -1].clone()


class GriffinSystem(TransformersSystem):
    """RecurrentGemma keeps the recurrence's state on its modules: it is moved into the state of a text, and back."""

    def _holders(self):
        for module in self.model.modules():
            if hasattr(module, "rg_lru"):
                yield module, "conv1d_state"
                yield module.rg_lru, "recurrent_states"

    def body(self, hidden_states, state=None, keep_state=False):
        cache, held = (None, []) if state is None else (state["cache"], state["held"])
        for (module, name), value in zip(self._holders(), held):
            setattr(module, name, value)
        hidden_states, cache = super().body(hidden_states, cache, keep_state)
        held = [getattr(module, name) for module, name in self._holders()]
        for module, name in self._holders():
            setattr(module, name, None)
        return hidden_states, {"cache": cache, "held": held} if keep_state else None


def griffin(shape: ModelShape, width: int) -> TransformersSystem:
    """RecurrentGemma: two recurrent blocks, then attention in a window of 4w; of two layers, one of each."""
    config = RecurrentGemmaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        lru_width=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=1,
        intermediate_size=2 * width,
        attention_window_size=4 * shape.window,
        block_types=["recurrent", "attention"]
        if shape.num_hidden_layers < 3
        else ["recurrent", "recurrent", "attention"],
        tie_word_embeddings=True,
    )
    model = RecurrentGemmaForCausalLM(config)
    for module in model.modules():
        if hasattr(module, "_rnn_scan"):
            module._rnn_scan = functools.partial(_scan_states, module)
    return GriffinSystem(model)
