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
"""LongViT configuration"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring

from .dilated_config import DilatedEncoderConfigMixin
from .transformers_compat import interval


AUTO_MAP = {
    "AutoConfig": "configuration_longvit.LongViTConfig",
    "AutoModel": "modeling_longvit.LongViTModel",
    "AutoModelForImageClassification": "modeling_longvit.LongViTForImageClassification",
}


@auto_docstring(
    checkpoint="longnet-transformers/longvit-small-patch32-1024",
    custom_intro="""
    Configuration of a LongViT: a bidirectional LongNet over the patches of a large image, as in
    [When an Image is Worth 1,024 x 1,024 Words](https://arxiv.org/abs/2312.03558). The defaults are its published
    model for images of 1,024 x 1,024 pixels.
    """,
)
@strict
class LongViTConfig(DilatedEncoderConfigMixin, PreTrainedConfig):
    r"""
    image_size (`int`, *optional*, defaults to 1024):
        Side of the images in pixels; it fixes the number of learned positions. Images of other sizes are read with
        interpolated ones.
    patch_size (`int`, *optional*, defaults to 32):
        Side of a patch in pixels.
    segment_lengths (`list[int]`, *optional*, defaults to `[64, 128, 256, 512, 1024]`):
        w of each pattern of the dilated attention, in patches. The original has other ones for images of 4,096 pixels
        and more: see `conversion/longvit_format.py`.
    dilation_rates (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 16]`):
        r of each pattern.
    head_offsets (`str`, *optional*, defaults to `"contiguous"`):
        See [`LongNetConfig`]; the published checkpoints have `"contiguous"`.
    padding (`str`, *optional*, defaults to `"zeros"`):
        See [`LongNetConfig`]; the published checkpoints have `"zeros"`.
    norm_before_pooling (`bool`, *optional*, defaults to `False`):
        Whether the patches are normalised before their mean is taken, as in pre-training, or the mean is, as in
        fine-tuned models.
    pooler_norm_eps (`float`, *optional*, defaults to 1e-05):
        Epsilon of that LayerNorm; 1e-06 in pre-training.
    sub_layernorm (`bool`, *optional*, defaults to `True`):
        Whether MAGNETO's second LayerNorm stands before each output projection.
    hidden_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the embeddings and on the output of each sub-layer, in training.
    activation_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the activations inside the feed-forward network.
    drop_path_rate (`float`, *optional*, defaults to 0.0):
        Stochastic depth, as in [`LongNetSlideEncoderConfig`].

    Raises:
        ValueError: for sizes and schedules that have no meaning.

    Example:

    ```python
    >>> from modeling_longnet import LongViTConfig, LongViTModel

    >>> model = LongViTModel(LongViTConfig(num_hidden_layers=2))
    ```"""

    model_type = "longvit"
    class_auto_map = AUTO_MAP

    image_size: int = 1024
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    segment_lengths: list[int] | tuple[int, ...] = (64, 128, 256, 512, 1024)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 8, 16)
    head_offsets: str = "contiguous"
    padding: str = "zeros"
    norm_before_pooling: bool = False
    pooler_norm_eps: int | float = 1e-5
    sub_layernorm: bool = True
    layer_norm_eps: int | float = 1e-5
    attention_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    activation_dropout: int | float = 0.0
    drop_path_rate: int | float = 0.0
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)

    def __post_init__(self, **kwargs):
        self.prepare(kwargs)
        super().__post_init__(**kwargs)
        # Called here as well, so that these errors come as plain ValueErrors.
        self.validate_architecture()

    def validate_architecture(self):
        """Part of `@strict`-powered validation: what the fields must satisfy together."""
        self.check_positive(
            "image_size", "patch_size", "num_channels", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads",
        )  # fmt: skip
        self.check_layers()
        if self.image_size < self.patch_size:
            raise ValueError(f"`image_size` must be at least `patch_size={self.patch_size}`, got {self.image_size}.")


__all__ = ["LongViTConfig"]
