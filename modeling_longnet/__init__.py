"""LongNet's dilated attention for Hugging Face Transformers.

Importing the package makes its models known to `AutoConfig` and the `AutoModel` classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ._version import __version__
from .configuration_longnet import LongNetConfig
from .dilated_attention import dilated_attention
from .dilated_attention_reference import dilated_attention_reference
from .dilation_schedule import DilationSchedule
from .modeling_longnet import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
    LongNetPreTrainedModel,
)


_AUTO_CLASSES = {
    LongNetModel: AutoModel,
    LongNetForCausalLM: AutoModelForCausalLM,
    LongNetForMaskedLM: AutoModelForMaskedLM,
    LongNetForQuestionAnswering: AutoModelForQuestionAnswering,
    LongNetForSequenceClassification: AutoModelForSequenceClassification,
    LongNetForTokenClassification: AutoModelForTokenClassification,
}

AutoConfig.register(LongNetConfig.model_type, LongNetConfig, exist_ok=True)
LongNetConfig.register_for_auto_class()  # this and its like below: save_pretrained copies the code next to the weights
for _model_class, _auto_class in _AUTO_CLASSES.items():
    _auto_class.register(LongNetConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "DilationSchedule",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "__version__",
    "dilated_attention",
    "dilated_attention_reference",
]
