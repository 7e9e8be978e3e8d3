"""Image GPT ("Generative Pretraining from Pixels", Chen et al., ICML 2020) for Hugging Face Transformers.

    image ── clusters ──▶ tokens ── modeling ──▶ logits ─┬─ loss ······· training, evaluation
             (palette)   (B, N)                         ├─ sampling ··· generation ──▶ image
                                                        └─ features ··· probing
    everything measured ──▶ records (JSON) ──▶ plots, model cards
    configuration, devices, throughput ──▶ costs ──▶ FLOPs, memory, hours

Shape letters, everywhere: B images, H×W pixels, N = H·W tokens, K colours, D width, L blocks.

Importing the package registers its classes with transformers' Auto classes, in place of transformers' own ImageGPT:
`AutoConfig`, `AutoModel`, `AutoModelForCausalLM`, `AutoModelForMaskedImageModeling`, `AutoModelForImageClassification`,
`AutoImageProcessor` and `pipeline` then return these.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_imagegpt import ImageGPTConfig
from .features_imagegpt import extract
from .generation_imagegpt import complete, sample
from .image_processing_imagegpt import ImageGPTImageProcessor, ImageGPTImageProcessorPil
from .modeling_imagegpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
    ImageGPTModel,
)
from .pipelines_imagegpt import ImageCompletionPipeline, ImageGPTFeatureExtractionPipeline


__version__ = "0.1.0"

AutoConfig.register("imagegpt", ImageGPTConfig, exist_ok=True)
AutoModel.register(ImageGPTConfig, ImageGPTModel, exist_ok=True)
AutoModelForCausalLM.register(ImageGPTConfig, ImageGPTForCausalImageModeling, exist_ok=True)
AutoModelForImageClassification.register(ImageGPTConfig, ImageGPTForImageClassification, exist_ok=True)
AutoModelForMaskedImageModeling.register(ImageGPTConfig, ImageGPTForMaskedImageModeling, exist_ok=True)

# Not AutoImageProcessor.register, which would load transformers' own processors first to merge with them.
IMAGE_PROCESSOR_MAPPING.register(  # whose annotation is of transformers before version 5
    ImageGPTConfig,
    {"pil": ImageGPTImageProcessorPil, "torchvision": ImageGPTImageProcessor},  # type: ignore[arg-type]
    exist_ok=True,
)
PIPELINE_REGISTRY.register_pipeline(
    "image-completion", pipeline_class=ImageCompletionPipeline, pt_model=AutoModelForCausalLM, type="image"
)
# A subclass of transformers' own, for two more options; `register_pipeline` would warn.
PIPELINE_REGISTRY.supported_tasks["image-feature-extraction"]["impl"] = ImageGPTFeatureExtractionPipeline

__all__ = [
    "ImageCompletionPipeline",
    "ImageGPTConfig",
    "ImageGPTForCausalImageModeling",
    "ImageGPTForImageClassification",
    "ImageGPTForMaskedImageModeling",
    "ImageGPTImageProcessor",
    "ImageGPTImageProcessorPil",
    "ImageGPTModel",
    "complete",
    "extract",
    "sample",
]
