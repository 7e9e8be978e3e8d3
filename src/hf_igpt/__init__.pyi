from .configuration_imagegpt import ImageGPTConfig
from .features_imagegpt import extract
from .generation_imagegpt import complete, inpaint, sample
from .image_processing_imagegpt import ImageGPTImageProcessor, ImageGPTImageProcessorPil
from .modeling_imagegpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
    ImageGPTModel,
)
from .pipelines_imagegpt import ImageCompletionPipeline

__version__: str

def register() -> None: ...

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
    "inpaint",
    "register",
    "sample",
]
