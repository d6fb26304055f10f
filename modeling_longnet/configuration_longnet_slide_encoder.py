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
"""LongNet slide encoder configuration"""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring

from .dilated_config import DilatedEncoderConfigMixin
from .transformers_compat import interval


AUTO_MAP = {
    "AutoConfig": "configuration_longnet_slide_encoder.LongNetSlideEncoderConfig",
    "AutoModel": "modeling_longnet_slide_encoder.LongNetSlideEncoderModel",
    "AutoModelForImageClassification": "modeling_longnet_slide_encoder.LongNetSlideEncoderForImageClassification",
}


@auto_docstring(
    checkpoint="longnet-transformers/longnet-slide-encoder-12l-768d",
    custom_intro="""
    Configuration of a LongNet slide encoder: a bidirectional LongNet over the tiles of a whole-slide image, as in
    [Prov-GigaPath](https://www.nature.com/articles/s41586-024-07441-w). The defaults are its published 12-layer model.
    """,
)
@strict
class LongNetSlideEncoderConfig(DilatedEncoderConfigMixin, PreTrainedConfig):
    r"""
    in_chans (`int`, *optional*, defaults to 1536):
        Width of the tile embeddings.
    slide_ngrids (`int`, *optional*, defaults to 1000):
        Number of rows and of columns in the grid of tiles that has positions.
    tile_size (`int`, *optional*, defaults to 256):
        Side of a tile, in the unit of the coordinates (pixels).
    max_wsi_size (`int`, *optional*, defaults to 262144):
        Side of the largest slide, in the same unit. It sets `segment_lengths` where those are not given.
    segment_lengths (`list[int]`, *optional*):
        w of each pattern of the dilated attention, in tiles. By default five lengths in geometric progression from
        1024 to the number of tiles in a slide of `max_wsi_size`.
    dilation_rates (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 16]`):
        r of each pattern: every r-th tile of a segment takes part.
    head_offsets (`str`, *optional*, defaults to `"contiguous"`):
        See [`LongNetConfig`]; the published checkpoints have `"contiguous"`.
    padding (`str`, *optional*, defaults to `"zeros"`):
        See [`LongNetConfig`]; the published checkpoints have `"zeros"`.
    pooling (`str`, *optional*, defaults to `"cls"`):
        What stands for the slide: `"cls"`, the class token, or `"mean"`, the mean over the tiles.
    classifier_layers (`list[int]`, *optional*):
        Layers whose slide embeddings, side by side, the classifier reads: 0 stands for the embeddings, and the final
        LayerNorm is skipped, as by Prov-GigaPath's fine-tuning (its `feat_layer`, `[11]` by default). By default the
        classifier reads the pooled output.
    pooler_norm_eps (`float`, *optional*, defaults to 1e-06):
        Epsilon of the LayerNorm after pooling; `layer_norm_eps` is that of all others.
    sub_layernorm (`bool`, *optional*, defaults to `True`):
        Whether MAGNETO's second LayerNorm stands before each output projection.
    hidden_dropout (`float`, *optional*, defaults to 0.25):
        Dropout on the embeddings and on the output of each sub-layer, in training.
    activation_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the activations inside the feed-forward network.
    drop_path_rate (`float`, *optional*, defaults to 0.1):
        Stochastic depth: probability that the last layer's sub-layers are skipped for a slide in training; it rises
        linearly from 0 at the first layer.

    Raises:
        ValueError: for sizes and schedules that have no meaning.

    Example:

    ```python
    >>> from modeling_longnet import LongNetSlideEncoderConfig, LongNetSlideEncoderModel

    >>> configuration = LongNetSlideEncoderConfig(num_hidden_layers=2)
    >>> model = LongNetSlideEncoderModel(configuration)
    >>> configuration.segment_lengths
    [1024, 5792, 32768, 185363, 1048576]
    ```"""

    model_type = "longnet_slide_encoder"
    class_auto_map = AUTO_MAP

    in_chans: int = 1536
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    slide_ngrids: int = 1000
    tile_size: int = 256
    max_wsi_size: int = 262144
    segment_lengths: list[int] | tuple[int, ...] | None = None
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 8, 16)
    head_offsets: str = "contiguous"
    padding: str = "zeros"
    pooling: str = "cls"
    classifier_layers: list[int] | tuple[int, ...] | None = None
    pooler_norm_eps: int | float = 1e-6
    sub_layernorm: bool = True
    layer_norm_eps: int | float = 1e-5
    attention_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.25
    activation_dropout: int | float = 0.0
    drop_path_rate: int | float = 0.1
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)

    def __post_init__(self, **kwargs):
        self._check_sizes()
        if self.segment_lengths is None:
            self.segment_lengths = self._lengths_for_slide_size()
        self.prepare(kwargs)
        if self.classifier_layers is not None:
            self.classifier_layers = list(self.classifier_layers)
        super().__post_init__(**kwargs)
        # Called here as well, so that these errors come as plain ValueErrors.
        self.validate_architecture()

    def _lengths_for_slide_size(self) -> list[int]:
        """Five lengths in geometric progression up to a whole slide's tiles (gigapath/slide_encoder.py)."""
        side = self.max_wsi_size // self.tile_size
        if side < 32:
            raise ValueError(
                f"`max_wsi_size` must be at least 32 tiles of `tile_size={self.tile_size}` when `segment_lengths` are "
                f"not given, got {self.max_wsi_size}."
            )
        top = int(math.log2(side**2))
        return [int(2 ** (10 + i * (top - 10) / 4)) for i in range(5)]

    def _check_sizes(self):
        self.check_positive(
            "in_chans", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "slide_ngrids",
            "tile_size", "max_wsi_size",
        )  # fmt: skip

    def validate_architecture(self):
        """Part of `@strict`-powered validation: what the fields must satisfy together."""
        self._check_sizes()
        self.check_layers()
        if self.hidden_size % 4:
            raise ValueError(
                "`hidden_size` must be a multiple of 4, for sines and cosines of rows and columns, got "
                f"{self.hidden_size}."
            )
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"`pooling` must be 'cls' or 'mean', got {self.pooling!r}.")
        layers = self.classifier_layers
        if layers is not None and not (layers and all(0 <= layer <= self.num_hidden_layers for layer in layers)):
            raise ValueError(
                f"`classifier_layers` must name layers from 0 to `num_hidden_layers={self.num_hidden_layers}`, got "
                f"{layers}."
            )


__all__ = ["LongNetSlideEncoderConfig"]
