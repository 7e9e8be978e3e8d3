from .arguments import DataArguments
from .images import find_image_files, named_images, random_crop, read_image, report_bad_images
from .prepare import TrainingImages, load_processor, processor_of, read_processor, sample_pixels
from .sources import IMAGE, LABEL, digits, label_classes, load_images, load_labelled_images, read_labels
from .tokens import (
    CLASS,
    MASK,
    TOKENS,
    ImageTokens,
    collate_classified,
    collate_tokens,
    drop_unreadable,
    repeat_stream,
    stream_tokens,
    token_array,
    tokenize,
)

__all__ = [
    "CLASS",
    "IMAGE",
    "LABEL",
    "MASK",
    "TOKENS",
    "DataArguments",
    "ImageTokens",
    "TrainingImages",
    "collate_classified",
    "collate_tokens",
    "digits",
    "drop_unreadable",
    "find_image_files",
    "label_classes",
    "load_images",
    "load_labelled_images",
    "load_processor",
    "named_images",
    "processor_of",
    "random_crop",
    "read_image",
    "read_labels",
    "read_processor",
    "repeat_stream",
    "report_bad_images",
    "sample_pixels",
    "stream_tokens",
    "token_array",
    "tokenize",
]
