"""LongNet's dilated attention for Hugging Face Transformers.

Importing the package makes its models known to `AutoConfig` and the `AutoModel` classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ._version import __version__
from .attention_module import DilatedAttention
from .calibrating import calibrate_memory
from .configuration_longnet import LongNetConfig
from .configuration_longnet_slide_encoder import LongNetSlideEncoderConfig
from .configuration_longvit import LongViTConfig
from .dilated_attention import dilated_attention
from .dilated_attention_reference import dilated_attention_reference
from .dilated_cache import DilatedCache
from .dilation_schedule import DilationSchedule
from .exporting import export_patched_model
from .memory_bank import MemoryBank
from .memory_heads import find_memory_heads
from .memory_passages import Answer, Passage
from .model_card import make_model_card, upload_with_card
from .modeling_longnet import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
    LongNetPreTrainedModel,
)
from .modeling_longnet_slide_encoder import LongNetSlideEncoderForImageClassification, LongNetSlideEncoderModel
from .modeling_longvit import LongViTForImageClassification, LongViTModel
from .patching import is_patched, load_patched_model, patch_model, unpatch_model
from .schedule_advice import suggest_schedule
from .transformers_compat import UPLOAD


_AUTO_CLASSES = {
    LongNetModel: AutoModel,
    LongNetForCausalLM: AutoModelForCausalLM,
    LongNetForMaskedLM: AutoModelForMaskedLM,
    LongNetForQuestionAnswering: AutoModelForQuestionAnswering,
    LongNetForSequenceClassification: AutoModelForSequenceClassification,
    LongNetForTokenClassification: AutoModelForTokenClassification,
    LongNetSlideEncoderModel: AutoModel,
    LongNetSlideEncoderForImageClassification: AutoModelForImageClassification,
    LongViTModel: AutoModel,
    LongViTForImageClassification: AutoModelForImageClassification,
}

for _config_class in (LongNetConfig, LongNetSlideEncoderConfig, LongViTConfig):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    _config_class.register_for_auto_class()  # this and its like below: save_pretrained copies the code as well
for _model_class, _auto in _AUTO_CLASSES.items():
    _auto.register(_model_class.config_class, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto.__name__)

setattr(LongNetPreTrainedModel, UPLOAD, upload_with_card)  # not in the model's file: it need not travel

__all__ = [
    "Answer",
    "DilatedAttention",
    "DilatedCache",
    "DilationSchedule",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "LongNetSlideEncoderConfig",
    "LongNetSlideEncoderForImageClassification",
    "LongNetSlideEncoderModel",
    "LongViTConfig",
    "LongViTForImageClassification",
    "LongViTModel",
    "MemoryBank",
    "Passage",
    "__version__",
    "calibrate_memory",
    "dilated_attention",
    "dilated_attention_reference",
    "export_patched_model",
    "find_memory_heads",
    "is_patched",
    "load_patched_model",
    "make_model_card",
    "patch_model",
    "suggest_schedule",
    "unpatch_model",
]
