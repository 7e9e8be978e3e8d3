"""transformers' common model and configuration tests on our classes, or with THEIRS=1 on transformers' own ImageGPT."""

import os
import unittest

import torch

from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor


if os.environ.get("THEIRS"):
    import transformers as package
else:
    import hf_igpt as package


class Tester:
    """Shapes and inputs that the common tests ask for."""

    batch_size, seq_length, vocab_size, num_labels = 4, 9, 17, 3
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    is_training = True

    def get_config(self):
        return package.ImageGPTConfig(
            vocab_size=self.vocab_size,
            n_positions=64,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            n_inner=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs_for_common(self):
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 1)
        return self.get_config(), {"input_ids": tokens}


class ImageGPTModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        package.ImageGPTModel,
        package.ImageGPTForCausalImageModeling,
        package.ImageGPTForImageClassification,
    )

    def setUp(self):
        self.model_tester = Tester()
        self.config_tester = ConfigTester(self, config_class=package.ImageGPTConfig, n_embd=32, n_head=2)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is not package.ImageGPTModel:
            causal = model_class is package.ImageGPTForCausalImageModeling
            inputs["labels"] = torch.zeros((4, 9) if causal else 4, dtype=torch.long)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("asks for a tester that the source package lacks")
    def test_generation_tester_mixin_inheritance(self):
        pass
