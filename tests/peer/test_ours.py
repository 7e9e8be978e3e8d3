"""transformers' common tests on our classes, or with THEIRS=1 on transformers' own ImageGPT.

One class for each kind of configuration, one for the image processors. What is overridden says why.
"""

import os
import unittest

import numpy as np
import torch


if os.environ.get("HF_IGPT_STUB_TORCHVISION"):  # before transformers looks for torchvision: see tests/conftest.py
    torchvision_operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        torchvision_operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers.utils import is_torchvision_available

from . import test_pipeline_mixin
from .test_configuration_common import ConfigTester
from .test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_pipeline_mixin import PipelineTesterMixin
from .test_training_mixin import TrainingTesterMixin


THEIRS = bool(os.environ.get("THEIRS"))
if THEIRS:
    import transformers as package
else:
    import hf_igpt as package

test_pipeline_mixin.transformers_module = package  # where it looks for image processors

PALETTE = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32).astype(float)  # theirs keep float32


class Tester:
    """Shapes and inputs that the common tests ask for."""

    batch_size, seq_length, vocab_size, num_labels = 4, 9, 21, 3  # 20 colours: the training tests draw 1..19
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    num_masks = 2  # pixels that are hidden, where a mask is given
    pad_token_id, bos_token_id = 0, 20  # without them, generation's tests pad nothing; SOS follows the colours
    is_training = True

    def __init__(self, trained, **options):
        self.causal_lm_class, self.options = trained, options  # what the training tests train, fields of the config

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
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 1)
        inputs = {"input_ids": tokens}
        if not self.options.get("sos_inputs"):  # which shift their inputs, pixels alone
            mask = torch.ones_like(tokens)
            mask[0, :2] = 0  # padding on the left
            inputs["attention_mask"] = mask
        if not self.options:  # causal: SOS comes first
            tokens[mask == 0], tokens[0, 2], tokens[1:, 0] = self.pad_token_id, self.bos_token_id, self.bos_token_id
        if self.options.get("objective") == "masked":
            inputs["bool_masked_pos"] = hidden(tokens)
        return self.get_config(), inputs


def hidden(tokens):
    """A mask of every third pixel."""
    return (torch.arange(tokens.shape[1], device=tokens.device) % 3 == 1).repeat(len(tokens), 1)


class Common(ModelTesterMixin, TrainingTesterMixin):
    """What holds of all kinds of configuration."""

    model_tester = None
    options = {}
    test_can_init_all_missing_weights_before_2023 = not THEIRS  # by the age of models, theirs is let off
    training_overfit_seq_length, training_overfit_steps, training_overfit_learning_rate = 32, 100, 5e-3

    def setUp(self):
        self.model_tester = Tester(self.trained_class, **self.options)
        self.config_tester = ConfigTester(
            self, config_class=package.ImageGPTConfig, n_embd=32, n_head=2, **self.options
        )
        # Theirs take an empty tuple for the weights of any attention but eager, which ours refuses.
        if self._testMethodName in ("test_model_outputs_equivalence", "test_capture_outputs_decorator"):
            prepare = self.model_tester.prepare_config_and_inputs_for_common

            def prepare_with_eager_attention():
                config, inputs = prepare()
                config._attn_implementation = "eager"
                return config, inputs

            self.model_tester.prepare_config_and_inputs_for_common = prepare_with_eager_attention
        # With a colour head, ours refuses what would take the place of SOS.
        if self._testMethodName.startswith("test_resize") and not THEIRS:
            self.all_model_classes = [kind for kind in self.all_model_classes if "ImageModeling" not in kind.__name__]

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if self.options.get("objective") != "masked":
            inputs.pop("bool_masked_pos", None)  # given to every class that has the argument; causal weights refuse it
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


class CausalTest(Common, PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (
        package.ImageGPTModel,
        package.ImageGPTForCausalImageModeling,
        package.ImageGPTForImageClassification,
    )
    trained_class = package.ImageGPTForCausalImageModeling
    pipeline_model_mapping = {
        "image-feature-extraction": package.ImageGPTModel,
        "image-classification": package.ImageGPTForImageClassification,
    }

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        processor = package.ImageGPTImageProcessorPil(clusters=PALETTE, size={"height": 8, "width": 8})
        for model_class in cls.pipeline_model_mapping.values():
            folder = f"hf-internal-testing/tiny-random-{model_class.__name__}"  # as their names on the Hub
            model_class(Tester(None).get_config()).save_pretrained(folder)
            processor.save_pretrained(folder)

    # Theirs ask for timm, which other models' processors need.
    def test_pipeline_image_feature_extraction(self):
        self.run_task_tests(task="image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self):
        self.run_task_tests(task="image-feature-extraction", dtype="float16")

    @unittest.skip("asks for a tester that the source package lacks")
    def test_generation_tester_mixin_inheritance(self):
        pass


class ImageTester(ImageProcessingTester):
    """Images and options that the common tests of image processors ask for."""

    batch_size, num_channels, min_resolution, max_resolution = 3, 3, 20, 60
    size = {"height": 18, "width": 16}

    def __init__(self):
        self.options = {"size": self.size, "clusters": PALETTE}

    def prepare_image_processor_dict(self):
        return self.options


class ImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = {"pil": package.ImageGPTImageProcessorPil}
    if is_torchvision_available():
        image_processing_classes["torchvision"] = package.ImageGPTImageProcessor

    def setUp(self):
        self.image_processor_tester = ImageTester()
        if self._testMethodName.startswith(("test_call", "test_backends", "test_can_compile")):
            self.image_processor_tester.options["do_color_quantize"] = False  # they look at `pixel_values`
        if self._testMethodName == "test_call_numpy_4_channels":
            # Newer versions of the test say so themselves.
            self.image_processor_tester.options["do_convert_rgb"] = False

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()

    def test_image_processor_to_json_string(self):
        # An array's equality is neither true nor false.
        self.image_processor_tester.options["clusters"] = PALETTE.tolist()
        super().test_image_processor_to_json_string()


if not THEIRS:

    class MaskedTest(Common, unittest.TestCase):
        all_model_classes = (
            package.ImageGPTModel,
            package.ImageGPTForMaskedImageModeling,
            package.ImageGPTForImageClassification,
        )
        trained_class = package.ImageGPTForMaskedImageModeling
        options = {"objective": "masked", "use_bias": False}

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
            if return_labels and model_class is package.ImageGPTForMaskedImageModeling:  # a name they do not know
                inputs["labels"] = inputs["input_ids"]
            return inputs

        def _create_text_training_batch(self, **shape):
            batch = super()._create_text_training_batch(**shape)
            return batch | {"bool_masked_pos": hidden(batch["input_ids"])}

    class SosClassifierTest(Common, unittest.TestCase):
        """Classifiers fed SOS, with the joint loss, and so with a colour head."""

        all_model_classes = (package.ImageGPTForImageClassification,)
        trained_class = package.ImageGPTForImageClassification
        options = {"sos_inputs": True, "generative_loss_weight": 1.0}
        test_resize_embeddings = False  # feeds the last token, SOS, which is no pixel; the causal classifier is resized

        def test_inputs_embeds_matches_input_ids(self):
            """Theirs compares base models alone."""
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = package.ImageGPTForImageClassification(config).eval()
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(**inputs).logits)

        def _create_text_training_batch(self, **shape):
            batch = super()._create_text_training_batch(**shape)
            return batch | {"labels": torch.ones(len(batch["input_ids"]), dtype=torch.long)}
