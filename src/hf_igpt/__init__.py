"""Image GPT ("Generative Pretraining from Pixels", Chen et al., ICML 2020) for Hugging Face Transformers.

    image ── clusters ──▶ tokens ── modeling ──▶ logits ─┬─ loss ······· training, evaluation
             (palette)   (B, N)                         ├─ sampling ··· generation ──▶ image
                                                        └─ features ··· probing
    everything measured ──▶ records (JSON) ──▶ plots, model cards
    configuration, devices, throughput ──▶ costs ──▶ FLOPs, memory, hours

Shape letters, everywhere: B images, H×W pixels, N = H·W tokens, K colours, D width, L blocks.

Importing the package registers its classes with transformers' Auto classes, in place of transformers' own ImageGPT:
`AutoConfig`, `AutoModel`, `AutoModelForCausalLM`, `AutoModelForMaskedImageModeling`, `AutoModelForImageClassification`,
`AutoImageProcessor` and `pipeline` then return these. That loads models; with HF_IGPT_REGISTER=later in the environment, as
the scripts set it to print their flags at once, it waits for `hf_igpt.register()`.
"""

import os

import lazy_loader


__version__ = "0.1.0"

# The names below are in `__init__.pyi`, and imported when they are first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["register"]


def register() -> None:
    """Make transformers' Auto classes and pipelines return ours."""
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
    from .image_processing_imagegpt import ImageGPTImageProcessor, ImageGPTImageProcessorPil
    from .modeling_imagegpt import (
        ImageGPTForCausalImageModeling,
        ImageGPTForImageClassification,
        ImageGPTForMaskedImageModeling,
        ImageGPTModel,
    )
    from .pipelines_imagegpt import (
        ImageCompletionPipeline,
        ImageGPTClassificationPipeline,
        ImageGPTFeatureExtractionPipeline,
    )

    AutoConfig.register("imagegpt", ImageGPTConfig, exist_ok=True)
    AutoModel.register(ImageGPTConfig, ImageGPTModel, exist_ok=True)
    AutoModelForCausalLM.register(ImageGPTConfig, ImageGPTForCausalImageModeling, exist_ok=True)
    AutoModelForImageClassification.register(ImageGPTConfig, ImageGPTForImageClassification, exist_ok=True)
    AutoModelForMaskedImageModeling.register(ImageGPTConfig, ImageGPTForMaskedImageModeling, exist_ok=True)
    # Not AutoImageProcessor.register, which would load transformers' own processors first to merge with them. The mapping's
    # annotation is of transformers before version 5.
    processors = {"pil": ImageGPTImageProcessorPil, "torchvision": ImageGPTImageProcessor}
    IMAGE_PROCESSOR_MAPPING.register(ImageGPTConfig, processors, exist_ok=True)  # type: ignore[arg-type]
    if "image-completion" not in PIPELINE_REGISTRY.supported_tasks:  # which would warn
        PIPELINE_REGISTRY.register_pipeline(
            "image-completion", pipeline_class=ImageCompletionPipeline, pt_model=AutoModelForCausalLM, type="image"
        )
    # Subclasses of transformers' own, which read images otherwise; `register_pipeline` would warn.
    PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = ImageGPTClassificationPipeline
    PIPELINE_REGISTRY.supported_tasks["image-feature-extraction"]["impl"] = ImageGPTFeatureExtractionPipeline


if os.environ.get("HF_IGPT_REGISTER") != "later":
    register()
