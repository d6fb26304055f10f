# Copyright 2026 The longnet-transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What LongNet offers as `attn_implementation`: dilated attention in the form that Transformers' models call.

Letters: B batch, H query heads, G key/value heads, Q tokens of the queries, N tokens of the keys, D head dimension.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .attention_pairs import attend_pairs
from .dilated_attention import ELSEWHERE, scheduled_attention
from .dilation_schedule import DilationSchedule
from .document_ids import holds_pairs
from .transformers_compat import closed_interface


logger = logging.get_logger(__name__)

def operator_arguments(
    module: nn.Module,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    query_offset: int | torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> dict:
    """The operator's arguments besides the tensors; `attention_mask` are the document ids [B, N] of the keys."""
    schedule = DilationSchedule.from_config(module.config).of_layer(module.layer_idx)
    is_causal = module.is_causal if is_causal is None else is_causal
    return {
        "schedule": schedule if schedule.is_causal == is_causal else replace(schedule, is_causal=is_causal),
        "scale": scaling,
        "dropout": dropout,
        "document_ids": attention_mask,
        "query_offset": query_offset,
    }


def _eager_with_memory(query, key, value, arguments: dict) -> tuple[torch.Tensor, None]:
    """The definition of attention with a memory, which gives no weights."""
    if holds_pairs(arguments["document_ids"]):
        raise ValueError("`attention_mask` of pairs tells no document, of whose blocks a `memory` could choose.")
    output = scheduled_attention(query, key, value, **arguments, backend="eager")
    return output.transpose(1, 2).contiguous(), None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: query [B, H, Q, D], key and value [B, G, N, D] to output [B, Q, H, D], weights [B, H, Q, N]."""
    arguments = operator_arguments(module, attention_mask, scaling, dropout, **kwargs)
    if arguments["schedule"].memory is not None:
        return _eager_with_memory(query, key, value, arguments)
    if holds_pairs(attention_mask):
        if module.config.padding == "zeros":
            raise ValueError("`attention_mask` of pairs tells no document's length, which `padding='zeros'` needs.")
        pairs = {"pair_mask": attention_mask[:, 0], "position": kwargs["position_ids"].expand(len(query), -1)}
        arguments |= {"document_ids": None, **pairs}
    output, weights = attend_pairs(query, key, value, **arguments)
    return output.transpose(1, 2).contiguous(), weights


def fused_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    backend: str,
    dropout: float = 0.0,
    output_attentions: bool | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """The operator, with the kernels that `backend` names: the same shapes, and no weights."""
    if output_attentions:
        logger.warning_once(
            f"`output_attentions=True` gives none with attn_implementation='{backend}', which never forms the N x N "
            "weights: call model.set_attn_implementation('eager') first."
        )
    if holds_pairs(attention_mask):
        logger.warning_once(
            f"An `attention_mask` of pairs is computed by the definition, in N x N memory: the '{backend}' kernels "
            "know documents only."
        )
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)[0], None
    if dropout > 0:
        logger.warning_once(
            f"The '{backend}' kernels have no dropout: with `attention_dropout` > 0 training uses the operator's plain "
            "PyTorch form, which is slower."
        )
        backend = "eager"
    arguments = operator_arguments(module, attention_mask, scaling, dropout, **kwargs)
    elsewhere = getattr(kwargs.get(ELSEWHERE), "attend", None)
    output = scheduled_attention(query, key, value, **arguments, backend=backend, elsewhere=elsewhere)
    return output.transpose(1, 2).contiguous(), None


# Only these names: every function of the library's own table would compute dense attention.
ALL_ATTENTION_FUNCTIONS = closed_interface(
    {name: partial(fused_attention_forward, backend=name) for name in ("sdpa", "flash_attention_2")}
)
