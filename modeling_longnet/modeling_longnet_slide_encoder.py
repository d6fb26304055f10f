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
"""PyTorch LongNet slide encoder: a bidirectional LongNet over the tiles of a whole-slide image.

Letters: B slides in the batch, N tiles of the longest slide, C hidden size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging

from .configuration_longnet_slide_encoder import LongNetSlideEncoderConfig
from .document_ids import reorder, restore_order
from .longnet_layers import LongNetDecoderLayer
from .modeling_longnet import LongNetPreTrainedModel
from .transformers_compat import capture_outputs, is_tracing, refuse_unread


logger = logging.get_logger(__name__)


@auto_docstring(custom_intro="What a slide encoder returns.")
@dataclass
class LongNetSlideEncoderOutput(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_tiles + 1, hidden_size)`):
        Class token and tiles after the last layer and the encoder's final LayerNorm. What stands in the rows of tiles
        that `attention_mask` hides has no meaning.
    pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
        Embedding of the slide: `last_hidden_state`, pooled as `config.pooling` says, after the pooler's LayerNorm.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
        The embeddings and the output of each layer, without the encoder's final LayerNorm, each of shape
        `(batch_size, num_tiles + 1, hidden_size)`.
    layer_embeddings (`tuple(torch.FloatTensor)` of length `num_hidden_layers + 1`):
        Embedding of the slide from the embeddings (first) and from each layer: `hidden_states`, pooled, after the
        pooler's LayerNorm, each of shape `(batch_size, hidden_size)`. They skip the encoder's final LayerNorm, so that
        the last one is not `pooler_output`. The original returns these for `all_layer_embed=True`.
    """

    layer_embeddings: tuple[torch.FloatTensor, ...] | None = None


class LongNetSlidePositionEmbedding(nn.Module):
    """Sines and cosines of the tile's column (first half of the features) and row (second half).

    The original keeps the whole grid, 3 GB for 1000 x 1000 tiles. Its two halves are rows of one and the same table.

    Source: gigapath/pos_embed.py and gigapath/slide_encoder.py, in which coords[..., 0] is the row.
    """

    def __init__(self, config: LongNetSlideEncoderConfig):
        super().__init__()
        self.config = config
        self.tile_size = config.tile_size
        self.slide_ngrids = config.slide_ngrids
        self.table = nn.Buffer(self.compute_table(config), persistent=False)

    @staticmethod
    def compute_table(config: LongNetSlideEncoderConfig) -> torch.Tensor:
        """[slide_ngrids, C / 2] in float32, from angles in float64."""
        width = config.hidden_size // 4
        frequencies = 10000.0 ** (-torch.arange(width, dtype=torch.float64) / width)
        angles = torch.arange(config.slide_ngrids, dtype=torch.float64)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1).float()

    def grid_cells(self, coords: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Row and column of each tile, [B, N, 2]; (0, 0) for hidden ones."""
        if coords.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                "`coords` must be integers, float32 or float64: half precisions cannot tell neighbouring tiles apart, "
                f"got {coords.dtype}."
            )
        cells = torch.div(coords, self.tile_size, rounding_mode="floor")
        if attention_mask is not None:
            cells = cells.masked_fill(~attention_mask[..., None], 0)
        inside = (cells >= 0) & (cells < self.slide_ngrids)  # false for NaN
        if not is_tracing(coords) and not inside.all():
            first = coords[~inside.all(dim=-1)][0].tolist()
            raise ValueError(
                f"`coords` must lie in a grid of `slide_ngrids={self.slide_ngrids}` tiles of `tile_size="
                f"{self.tile_size}` each way, i.e. from 0 to below {self.slide_ngrids * self.tile_size}, got {first}."
            )
        self.warn_of_one_cell(cells, attention_mask)
        return cells.long()

    def warn_of_one_cell(self, cells: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Indices of the grid, taken for pixels, all fall into its first cell: then no tile has a place of its own."""
        if is_tracing(cells):
            return
        elsewhere = (cells != cells[:, :1]).any(dim=-1)
        several = cells.shape[1] > 1
        if attention_mask is not None:  # hidden tiles stand behind the others
            elsewhere, several = elsewhere & attention_mask, attention_mask[:, 1:].any(dim=1)
        if (~elsewhere.any(dim=1) & several).any():
            logger.warning_once(
                f"`coords` put all tiles of a slide into one cell of the grid (`tile_size={self.tile_size}`): they "
                "must be pixels, not indices of the grid. Multiply indices by `config.tile_size`."
            )

    def forward(self, coords: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Positions [B, N, C] of tiles at `coords` [B, N, 2]."""
        rows, columns = self.grid_cells(coords, attention_mask).unbind(-1)
        return torch.cat((self.table[columns], self.table[rows]), dim=-1)


class LongNetSlideEmbeddings(nn.Module):
    """Class token and projected tiles with their positions; the class token's own position is all zeros."""

    def __init__(self, config: LongNetSlideEncoderConfig):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.projection = nn.Linear(config.in_chans, config.hidden_size)
        self.position_embedding = LongNetSlidePositionEmbedding(config)

    def forward(
        self, tile_embeds: torch.Tensor, coords: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        # Pipelines store float16; the class token has the model's dtype even where the projection is quantised.
        tiles = self.projection(tile_embeds.to(self.cls_token.dtype))
        tiles = tiles + self.position_embedding(coords, attention_mask).to(tiles.dtype)
        hidden_states = torch.cat((self.cls_token.to(tiles.dtype).expand(len(tiles), -1, -1), tiles), dim=1)
        return nn.functional.dropout(hidden_states, p=self.hidden_dropout, training=self.training)


class LongNetSlidePooler(nn.Module):
    """One vector for a slide: class token or mean over its tiles, then a LayerNorm."""

    def __init__(self, config: LongNetSlideEncoderConfig):
        super().__init__()
        self.pooling = config.pooling
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.pooler_norm_eps)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """[B, N + 1, C] to [B, C]; `attention_mask` [B, N], true for tiles."""
        # CODEPATH: gigapath's global_pool.
        if self.pooling == "cls":
            return self.norm(hidden_states[:, 0])
        tiles = hidden_states[:, 1:]
        if attention_mask is None:
            return self.norm(tiles.mean(dim=1))
        total = tiles.masked_fill(~attention_mask[..., None], 0).sum(dim=1, dtype=torch.float)
        return self.norm((total / attention_mask.sum(dim=1, keepdim=True)).to(tiles.dtype))


@auto_docstring
class LongNetSlideEncoderPreTrainedModel(LongNetPreTrainedModel):
    config: LongNetSlideEncoderConfig
    main_input_name = "tile_embeds"
    input_modalities = ("image",)
    _skip_keys_device_placement = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LongNetSlideEmbeddings):
            init.normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LongNetSlidePositionEmbedding):
            init.copy_(module.table, module.compute_table(module.config))


@auto_docstring(
    custom_intro="""
    A LongNet that reads the tile embeddings of a whole-slide image and gives an embedding of the slide.
    """
)
class LongNetSlideEncoderModel(LongNetSlideEncoderPreTrainedModel):
    def __init__(self, config: LongNetSlideEncoderConfig):
        super().__init__(config)
        config.validate_architecture()  # `from_pretrained` sets the fields that it is given after they were checked
        self.embeddings = LongNetSlideEmbeddings(config)
        self.layers = nn.ModuleList(
            [LongNetDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = LongNetSlidePooler(config)
        self.gradient_checkpointing = False

        # Initialize weights and apply final processing
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.projection = value

    def check_inputs(
        self, tile_embeds: torch.Tensor, coords: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> None:
        """Refuses shapes that do not fit together, and slides without a tile."""
        shape = tuple(tile_embeds.shape)
        if len(shape) != 3 or shape[1] == 0 or shape[2] != self.config.in_chans:
            raise ValueError(
                f"`tile_embeds` must have shape [batch, tiles, in_chans={self.config.in_chans}] and at least one tile, "
                f"got {shape}."
            )
        if not tile_embeds.is_floating_point():
            raise ValueError(f"`tile_embeds` must be floating point numbers, got {tile_embeds.dtype}.")
        if tuple(coords.shape) != (*shape[:2], 2):
            raise ValueError(f"`coords` must have shape {(*shape[:2], 2)}, got {tuple(coords.shape)}.")
        if attention_mask is None:
            return
        if tuple(attention_mask.shape) != shape[:2]:
            raise ValueError(f"`attention_mask` must have shape {shape[:2]}, got {tuple(attention_mask.shape)}.")
        if not is_tracing(attention_mask) and not attention_mask.bool().any(dim=1).all():
            raise ValueError("`attention_mask` must leave at least one tile of each slide, got a row of zeros.")

    @capture_outputs(tie_last_hidden_states=False)
    def encode(
        self,
        tile_embeds: torch.Tensor,
        coords: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongNetSlideEncoderOutput:
        """`forward` for tiles that stand side by side, with padding [B, N] (false) behind them."""
        document_ids = None
        if attention_mask is not None:
            document_ids = nn.functional.pad(attention_mask, (1, 0), value=True).long() - 1
        hidden_states = self.embeddings(tile_embeds, coords, attention_mask)
        layer_embeddings = [self.pooler(hidden_states, attention_mask)]
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=document_ids, **kwargs)
            layer_embeddings.append(self.pooler(hidden_states, attention_mask))
        hidden_states = self.norm(hidden_states)
        return LongNetSlideEncoderOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states, attention_mask),
            layer_embeddings=tuple(layer_embeddings),
        )

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        tile_embeds: torch.Tensor,
        coords: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongNetSlideEncoderOutput:
        r"""
        tile_embeds (`torch.Tensor` of shape `(batch_size, num_tiles, in_chans)`):
            Embeddings of the tiles, in the order in which the attention counts them, in any floating point dtype: they
            are taken to the model's.
        coords (`torch.Tensor` of shape `(batch_size, num_tiles, 2)`):
            Coordinates of each tile's corner in pixels, as the tile encoder's pipeline gives them: integers, float32
            or float64. Coordinates outside the grid are refused.
        attention_mask (`torch.Tensor` of shape `(batch_size, num_tiles)`, *optional*):
            1 for tiles, 0 for padding, wherever it stands. Each slide gets the embedding that it has alone.

        Example:

        ```python
        >>> import torch
        >>> from modeling_longnet import LongNetSlideEncoderConfig, LongNetSlideEncoderModel

        >>> model = LongNetSlideEncoderModel(LongNetSlideEncoderConfig(num_hidden_layers=2)).eval()
        >>> tiles, coords = torch.randn(1, 300, 1536), torch.randint(0, 256_000, (1, 300, 2))
        >>> model(tiles, coords).pooler_output.shape
        torch.Size([1, 768])
        ```"""
        refuse_unread(type(self).__name__, kwargs)
        self.check_inputs(tile_embeds, coords, attention_mask)
        if attention_mask is None:
            return self.encode(tile_embeds, coords, None, **kwargs)
        # Segments count the tiles that there are: those side by side, padding behind, and back afterwards.
        real = attention_mask.bool()
        order = (~real).long().argsort(dim=1, stable=True)
        outputs = self.encode(*(reorder(x, order, dim=1) for x in (tile_embeds, coords, real)), **kwargs)
        order = nn.functional.pad(order + 1, (1, 0))  # the class token stays first
        outputs.last_hidden_state = restore_order(outputs.last_hidden_state, order, dim=1)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(restore_order(x, order, dim=1) for x in outputs.hidden_states)
        if outputs.attentions is not None:
            outputs.attentions = tuple(
                restore_order(restore_order(x, order, dim=2), order, dim=3) for x in outputs.attentions
            )
        return outputs


@auto_docstring(
    custom_intro="""
    A slide encoder with a linear head on the embedding of the slide: what a whole-slide image shows. The head reads the
    pooled output, or the embeddings of the layers that `config.classifier_layers` names, side by side.
    """
)
class LongNetSlideEncoderForImageClassification(LongNetSlideEncoderPreTrainedModel):
    # The loss is a mean over the batch, so the Trainer must divide it by the steps that it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: LongNetSlideEncoderConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LongNetSlideEncoderModel(config)
        width = config.hidden_size * len(config.classifier_layers or [-1])
        self.classifier = nn.Linear(width, config.num_labels)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        tile_embeds: torch.Tensor,
        coords: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        tile_embeds (`torch.Tensor` of shape `(batch_size, num_tiles, in_chans)`):
            See [`LongNetSlideEncoderModel`]; so are `coords` and `attention_mask`.
        coords (`torch.Tensor` of shape `(batch_size, num_tiles, 2)`):
            Coordinates of each tile's corner in pixels.
        attention_mask (`torch.Tensor` of shape `(batch_size, num_tiles)`, *optional*):
            1 for tiles, 0 for padding.
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Classes for the loss; numbers for `num_labels=1`; zeros and ones for
            `problem_type="multi_label_classification"`.

        Example:

        ```python
        >>> import torch
        >>> from modeling_longnet import LongNetSlideEncoderConfig, LongNetSlideEncoderForImageClassification

        >>> config = LongNetSlideEncoderConfig(num_hidden_layers=2, num_labels=3)
        >>> model = LongNetSlideEncoderForImageClassification(config).eval()
        >>> tiles, coords = torch.randn(1, 300, 1536), torch.randint(0, 256_000, (1, 300, 2))
        >>> model(tiles, coords).logits.shape
        torch.Size([1, 3])
        ```"""
        outputs: LongNetSlideEncoderOutput = self.model(tile_embeds, coords, attention_mask, **kwargs)
        embedding = outputs.pooler_output
        # CODEPATH: gigapath's feat_layer; its fine-tuned models skip the encoder's final LayerNorm.
        if self.config.classifier_layers is not None:
            embedding = torch.cat([outputs.layer_embeddings[i] for i in self.config.classifier_layers], dim=-1)
        logits = self.classifier(embedding)
        loss = self.loss_function(labels, logits, self.config) if labels is not None else None
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "LongNetSlideEncoderForImageClassification",
    "LongNetSlideEncoderModel",
    "LongNetSlideEncoderPreTrainedModel",
]
