"""The class that Transformers' own tests are run on, laid out beside them by `run_upstream_tests.py`.

It is what each decoder model of Transformers has: its causal-LM tester with the model's classes. No check of the tests
is overridden.
"""

import unittest

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers.models.auto import modeling_auto

import modeling_longnet
from modeling_longnet import LongNetModel
from tests import test_fsdp_mixin, test_tensor_parallel_mixin


# The mixins know what a class is for by these tables of names, which Transformers keeps for its own models.
for table, head in (
    ("MODEL_MAPPING_NAMES", "LongNetModel"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "LongNetForCausalLM"),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "LongNetForQuestionAnswering"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "LongNetForSequenceClassification"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "LongNetForTokenClassification"),
):
    getattr(modeling_auto, table)["longnet"] = head

# Distributed tests run for a list of Transformers' own model types otherwise.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class LongNetModelTester(CausalLMModelTester):
    base_model_class = LongNetModel
    config_class = modeling_longnet.LongNetConfig
    causal_lm_class = modeling_longnet.LongNetForCausalLM
    question_answering_class = modeling_longnet.LongNetForQuestionAnswering
    sequence_classification_class = modeling_longnet.LongNetForSequenceClassification
    token_classification_class = modeling_longnet.LongNetForTokenClassification

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **kwargs)
        # Most texts of the tests have 7 to 30 tokens: each rate then takes part.
        self.segment_lengths, self.dilation_rates = [4, 8, 16], [1, 2, 2]


class LongNetModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = LongNetModelTester
