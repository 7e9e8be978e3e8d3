"""Any image to 8-bit RGB: PIL images of every mode, numpy and torch arrays, and files.

An array has 1, 3 or 4 channels (grey, RGB, RGBA), first or last. Integers are grey levels 0..255. Floats keep their
values, because only the processor's options know their scale. Transparency is composited onto white.
"""

import os
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format


ImageArray: TypeAlias = np.ndarray | torch.Tensor
AnyImage: TypeAlias = Image.Image | ImageArray


def open_image(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Read an image file and turn it upright by its EXIF tag. The mode is the file's own.

    Errors of PIL's decoders, which are of many types, are not caught.
    """
    with Image.open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_rgb_image(image: AnyImage, layout: ChannelDimension | str | None = None) -> Image.Image:
    """Convert a PIL image of any mode, or an array of grey levels, to a PIL image of mode RGB.

    Arrays have shape (H, W), (H, W, C) or (C, H, W); `layout` chooses between the last two if both are possible.
    Floats are a ValueError, because their scale is unknown.
    """
    if isinstance(image, Image.Image):
        return _convert_pil_to_rgb(_reduce_pil_depth(image))
    image = image if torch.is_tensor(image) else np.asarray(image)
    if is_floating(image):
        raise ValueError(f"Image arrays hold integer grey levels 0..255; found an array of {image.dtype}.")
    image = _reduce_array_depth(image[None] if image.ndim == 2 else image)
    return Image.fromarray(np.ascontiguousarray(to_pixels(_convert_array_to_rgb(image, layout))))


def to_pixels(image: AnyImage) -> np.ndarray:
    """Return the pixels of a PIL image or an array (C, H, W) as a numpy array (H, W, C)."""
    if isinstance(image, Image.Image):
        return np.asarray(image)
    return np.asarray(image.cpu() if torch.is_tensor(image) else image).transpose(1, 2, 0)


def to_channels_first(image: AnyImage) -> ImageArray:
    """Return a PIL image of mode RGB as a numpy array (3, H, W). Arrays are returned unchanged."""
    return np.asarray(image).transpose(2, 0, 1) if isinstance(image, Image.Image) else image


def is_floating(image: AnyImage) -> bool:
    """Whether `image` is an array of floats."""
    if isinstance(image, Image.Image):
        return False
    return image.is_floating_point() if torch.is_tensor(image) else image.dtype.kind == "f"


def is_eight_bit(image: AnyImage) -> bool:
    """Whether `image`, PIL of mode RGB or an array, holds 8-bit grey levels."""
    return isinstance(image, Image.Image) or image.dtype in (np.uint8, torch.uint8)


def reduce_depth(image: AnyImage) -> AnyImage:
    """Reduce an image to 8 bits per channel; it stays a PIL image, a numpy array or a tensor. Arrays have 3 dimensions.

    PIL modes: I;16 holds 16-bit greys; I holds 8-bit greys unless a pixel exceeds 255, and otherwise 16-bit greys; F holds
    8-bit greys. Arrays: booleans become 0 and 255, integers must lie in 0..255, and floats are returned unchanged.
    Other values and shapes are a ValueError.
    """
    return _reduce_pil_depth(image) if isinstance(image, Image.Image) else _reduce_array_depth(image)


def convert_to_rgb(image: AnyImage, layout: ChannelDimension | str | None = None) -> AnyImage:
    """Convert a PIL image of at most 8 bits per channel to mode RGB, or an array to shape (3, H, W).

    Greys are repeated and transparency is composited onto white. RGBA floats outside [0, 1] are a ValueError.
    layout: the layout of an array; None infers it from the shape.
    """
    return _convert_pil_to_rgb(image) if isinstance(image, Image.Image) else _convert_array_to_rgb(image, layout)


def crop_to_square(image: AnyImage) -> AnyImage:
    """Crop a PIL image or an array (..., H, W) to its largest central square.

    An odd margin leaves its extra pixel at the bottom or right.
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[:-3:-1]
    if width == height:
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if isinstance(image, Image.Image):
        return image.crop((left, top, left + side, top + side))
    return image[..., top : top + side, left : left + side]


def _reduce_pil_depth(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    top = 65535 if image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255) else 255
    if values.size and not (values.min() >= 0 and values.max() <= top):
        raise ValueError(
            f"An image of mode {image.mode} has values from {values.min():.4g} to {values.max():.4g}, outside 0..{top}: "
            "rescale it first."
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _reduce_array_depth(image: ImageArray) -> ImageArray:
    if image.ndim != 3 or not {image.shape[0], image.shape[-1]} & {1, 3, 4}:
        raise ValueError(
            "An image array has shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels; "
            f"found {tuple(image.shape)}."
        )
    if is_floating(image) or is_eight_bit(image):
        return image
    is_boolean = image.dtype in (bool, torch.bool)
    if not is_boolean and (image.min() < 0 or image.max() > 255):
        raise ValueError(
            f"An integer image ({image.dtype}) has values from {image.min()} to {image.max()}, outside the grey levels "
            "0..255: rescale it first."
        )
    image = image.to(torch.uint8) if torch.is_tensor(image) else image.astype(np.uint8)
    return image * 255 if is_boolean else image


def _convert_pil_to_rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except OSError as error:  # PIL reads the pixels of an opened file only here
        raise ValueError(f"The image {getattr(image, 'filename', '')} cannot be read: {error}") from error
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _convert_array_to_rgb(image: ImageArray, layout: ChannelDimension | str | None) -> ImageArray:
    if layout is None:
        layout = infer_channel_dimension_format(image, num_channels=(1, 3, 4))  # type: ignore[arg-type]  # takes tensors too
    layout = ChannelDimension(layout)
    if layout == ChannelDimension.LAST:
        image = image.permute(2, 0, 1) if torch.is_tensor(image) else image.transpose(2, 0, 1)
    if len(image) == 1:
        return image.repeat(3, 1, 1) if torch.is_tensor(image) else image.repeat(3, axis=0)
    if len(image) != 4:
        return image
    white = 255.0 if is_eight_bit(image) else 1.0
    if white == 1 and (image.min() < 0 or image.max() > 1):
        raise ValueError(f"RGBA floats lie in [0, 1]; found {image.dtype} from {image.min()} to {image.max()}.")
    alpha = image[3:] / white
    composite: Any = alpha * image[:3] + (1 - alpha) * white  # an array of the same library as `image`
    composite = composite.round() if is_eight_bit(image) else composite
    return composite.to(image.dtype) if torch.is_tensor(image) else composite.astype(image.dtype)
