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
"""PyTorch LongViT: a bidirectional LongNet over the patches of a large image, row by row.

Letters: B images in the batch, N patches, C hidden size.

Source: examples/longvit/longvit.py, modeling_finetune.py and pretraining/vision_transformer.py of torchscale.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_longvit import LongViTConfig
from .longnet_layers import LongNetDecoderLayer
from .modeling_longnet import LongNetPreTrainedModel
from .transformers_compat import capture_outputs, refuse_unread


class LongViTEmbeddings(nn.Module):
    """Patches and their learned positions, which are interpolated for images of another size."""

    def __init__(self, config: LongViTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_channels = config.num_channels
        self.hidden_dropout = config.hidden_dropout
        self.side = config.image_size // config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.side**2, config.hidden_size))

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """[1, rows * columns, C]; bicubic as in the original, whose scale is a tenth of a patch too large."""
        if rows == columns == self.side:
            return self.position_embeddings
        grid = self.position_embeddings.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / self.side, (columns + 0.1) / self.side)
        grid = nn.functional.interpolate(grid.float(), scale_factor=scale, mode="bicubic").to(grid.dtype)
        return grid.flatten(2).transpose(1, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.num_channels or min(shape[2:]) < self.patch_size:
            raise ValueError(
                f"`pixel_values` must have shape [batch, {self.num_channels}, height, width] with at least one patch "
                f"of {self.patch_size} pixels each way, got {shape}."
            )
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))
        hidden_states = patches.flatten(2).transpose(1, 2) + self.positions(*patches.shape[2:])
        return nn.functional.dropout(hidden_states, p=self.hidden_dropout, training=self.training)


class LongViTPooler(nn.Module):
    """Mean of the patches and a LayerNorm, in the order that the configuration tells."""

    def __init__(self, config: LongViTConfig):
        super().__init__()
        self.norm_before_pooling = config.norm_before_pooling
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.pooler_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, C] to [B, C]."""
        # CODEPATH: the pre-trained model normalises each patch, fine-tuned ones their mean.
        if self.norm_before_pooling:
            return self.norm(hidden_states).mean(dim=1)
        return self.norm(hidden_states.mean(dim=1))


@auto_docstring
class LongViTPreTrainedModel(LongNetPreTrainedModel):
    config: LongViTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _skip_keys_device_placement = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LongViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)


@auto_docstring(
    custom_intro="""
    A LongNet that reads the patches of a large image and gives its embedding.
    """
)
class LongViTModel(LongViTPreTrainedModel):
    def __init__(self, config: LongViTConfig):
        super().__init__(config)
        config.validate_architecture()  # `from_pretrained` sets the fields that it is given after they were checked
        self.embeddings = LongViTEmbeddings(config)
        self.layers = nn.ModuleList(
            [LongNetDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.pooler = LongViTPooler(config)
        self.gradient_checkpointing = False

        # Initialize weights and apply final processing
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.projection = value

    @capture_outputs
    @auto_docstring
    def forward(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Normalised pixels, in any floating point dtype: they are taken to the model's. What does not fill a patch at
            the right and lower edges is not read.

        Example:

        ```python
        >>> import torch
        >>> from modeling_longnet import LongViTConfig, LongViTModel

        >>> model = LongViTModel(LongViTConfig(num_hidden_layers=2)).eval()
        >>> model(torch.randn(1, 3, 512, 768)).pooler_output.shape
        torch.Size([1, 384])
        ```"""
        refuse_unread(type(self).__name__, kwargs)
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.pooler(hidden_states))


@auto_docstring(
    custom_intro="""
    A LongViT with a linear head on the embedding of the image.
    """
)
class LongViTForImageClassification(LongViTPreTrainedModel):
    # The loss is a mean over the batch, so the Trainer must divide it by the steps that it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: LongViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LongViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Normalised pixels.
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Classes for the loss; numbers for `num_labels=1`; zeros and ones for
            `problem_type="multi_label_classification"`.
        """
        outputs: BaseModelOutputWithPooling = self.model(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = self.loss_function(labels, logits, self.config) if labels is not None else None
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["LongViTForImageClassification", "LongViTModel", "LongViTPreTrainedModel"]
