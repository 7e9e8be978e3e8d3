"""Any image to 8-bit RGB: PIL images of every mode, numpy and torch arrays, files, URLs, base64 and bytes.

Every entrance (processors, pipelines, training) reads an image by `open_image`, `reduce_depth` and `convert_to_rgb`.

An array has 1, 3 or 4 channels (grey, RGB, RGBA), first or last; where its shape allows both, they are last in numpy arrays
and first in torch tensors. Integers are grey levels 0..255. Floats keep their values, because only the processor's options
know their scale. Transparency is composited onto white.
"""

import base64
import io
import math
import os
import reprlib
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension
from transformers.utils import logging


ImageArray: TypeAlias = np.ndarray | torch.Tensor
AnyImage: TypeAlias = Image.Image | ImageArray
ImageSource: TypeAlias = AnyImage | str | os.PathLike[str] | bytes | io.IOBase

_CHANNELS = (1, 3, 4)
_TORCH_INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
_ORIENTATION = int(ExifTags.Base.Orientation)
_URLS = ("http://", "https://")
_DATA_URL = "data:image/"

logger = logging.get_logger(__name__)


def open_image(source: ImageSource, timeout: float | None = None) -> AnyImage:
    """Return the image that `source` is or names: a PIL image, loaded, upright, in its own mode; or an array, unchanged.

    source: a PIL image, an array, a path, a URL, base64, or the bytes of an image file. timeout: in seconds, for downloads.
    PIL images are turned upright by their EXIF tag, which the result lacks; a tag that cannot be read turns nothing. What
    cannot be read is a ValueError that says why and leaves it to the caller to name the image, and so is an image of more
    than `PIL.Image.MAX_IMAGE_PIXELS` pixels, before they take memory.
    """
    try:
        if isinstance(source, Image.Image):
            return _load(source)
        if isinstance(source, (np.ndarray, torch.Tensor)):
            _check_size(*sorted((1, 1, *source.shape))[-2:])  # height and width in any layout
            if torch.is_tensor(source) and (source.layout != torch.strided or source.is_meta):
                raise ValueError("a tensor of pixels is dense and not on the meta device")
            return source if torch.is_tensor(source) else np.asarray(source)  # no matrix, no masked array
        with Image.open(_find_file(source, timeout)) as image:
            return _load(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} {_limit_and_remedy()}") from error
    except UnidentifiedImageError as error:
        is_name = isinstance(source, str) and not source.startswith((*_URLS, _DATA_URL)) and not os.path.isfile(source)
        raise ValueError("there is no such file" if is_name else "it is not an image") from error
    except (OSError, ValueError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
    except Exception as error:  # decoders and downloads raise errors of any type: SyntaxError, struct.error, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _find_file(source: Any, timeout: float | None) -> Any:
    """Return the path of a file that is there, or a file object, for `PIL.Image.open`."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, io.IOBase):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"images are PIL images, arrays, paths, URLs, base64 or bytes, or lists of these; found {type(source).__name__}"
        )
    if os.path.isfile(source):
        return source
    if isinstance(source, os.PathLike) or os.path.exists(source):
        raise ValueError("it is not a file" if os.path.exists(source) else "there is no such file")
    if source.startswith(_URLS):
        from transformers.image_utils import httpx  # the one by which it downloads images, under whichever name

        return io.BytesIO(httpx.get(source, timeout=timeout, follow_redirects=True).raise_for_status().content)
    try:
        return io.BytesIO(base64.decodebytes(source[source.startswith(_DATA_URL) and source.find(",") + 1 :].encode()))
    except ValueError as error:
        raise UnidentifiedImageError from error


def _load(image: Image.Image) -> Image.Image:
    _check_size(*image.size)
    if image.format == "EPS":
        raise ValueError("an EPS file is a program, which Ghostscript would run: convert it to PNG")
    image.load()
    try:
        exif = image.getexif()
    except Exception:  # of any type; PIL raises it once for an image, and takes its tag for empty afterwards
        return image
    is_turned = _ORIENTATION in exif and exif[_ORIENTATION] in range(2, 9)
    return ImageOps.exif_transpose(image) if is_turned else image


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"it has {width} x {height} = {width * height:,} pixels. {_limit_and_remedy()}")


def _limit_and_remedy() -> str:
    return f"At most {Image.MAX_IMAGE_PIXELS:,} are read: make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS."


def to_rgb_image(image: AnyImage, layout: ChannelDimension | str | None = None) -> Image.Image:
    """Convert a PIL image of any mode, or an array of grey levels, to a PIL image of mode RGB.

    Arrays have shape (H, W), (H, W, C) or (C, H, W); layout: as in `find_layout`. Floats are a ValueError, because their scale
    is unknown.
    """
    if isinstance(image, Image.Image):
        return _convert_pil_to_rgb(_reduce_pil_depth(image))
    image = image if torch.is_tensor(image) else np.asarray(image)
    if is_floating(image):
        raise ValueError(f"Image arrays hold integer grey levels 0..255; found an array of {image.dtype}.")
    image = _convert_array_to_rgb(_reduce_array_depth(image), layout)
    return Image.fromarray(np.ascontiguousarray(to_pixels(image)))


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


def find_layout(image: ImageArray, layout: ChannelDimension | str | None = None) -> ChannelDimension:
    """Return whether the channels of an array with 3 dimensions are first or last, as `layout` says if it is not None.

    Where the shape allows both, they are last in numpy arrays and first in torch tensors, and a warning says so. A number of
    channels other than 1, 3 and 4 is a ValueError.
    """
    usual, other = ChannelDimension.LAST, ChannelDimension.FIRST
    if torch.is_tensor(image):
        usual, other = other, usual
    if layout is not None:
        usual = other = ChannelDimension(layout)
    possible = [it for it in (usual, other) if image.shape[0 if it == ChannelDimension.FIRST else -1] in _CHANNELS]
    if not possible:
        raise _shape_error(image)
    if len(set(possible)) == 2:
        logger.warning_once(
            f"An image array of shape {tuple(image.shape)} may have its channels first or last: {usual.value} is assumed, as "
            "is usual for its type. Pass input_data_format to decide."
        )
    return possible[0]


def size_of(image: AnyImage) -> tuple[int, int]:
    """Return the (width, height) in pixels of a PIL image or an array; layout: as `find_layout` finds it."""
    if isinstance(image, Image.Image):
        return image.size
    is_last = image.ndim == 3 and find_layout(image) == ChannelDimension.LAST
    height, width = image.shape[:2] if is_last else image.shape[-2:]
    return width, height


def reduce_depth(image: AnyImage) -> AnyImage:
    """Reduce an image to 8 bits per channel; it stays a PIL image, a numpy array or a tensor. Arrays have 2 or 3 dimensions.

    PIL modes: I;16 holds 16-bit greys; I holds 8-bit greys unless a pixel exceeds 255, and otherwise 16-bit greys; F holds
    8-bit greys unless all lie in [0, 1], and otherwise greys in [0, 1]. Arrays: booleans become 0 and 255, integers must lie
    in 0..255, and finite floats keep their values, in float32 or float64. Other values and types are a ValueError.
    """
    return _reduce_pil_depth(image) if isinstance(image, Image.Image) else _reduce_array_depth(image)


def convert_to_rgb(image: AnyImage, layout: ChannelDimension | str | None = None) -> AnyImage:
    """Convert a PIL image of at most 8 bits per channel to mode RGB, or an array to shape (3, H, W).

    Greys are repeated and transparency is composited onto white. RGBA floats outside [0, 1] are a ValueError.
    layout: of an array, as in `find_layout`.
    """
    return _convert_pil_to_rgb(image) if isinstance(image, Image.Image) else _convert_array_to_rgb(image, layout)


def crop_to_proportions(image: AnyImage, grid: tuple[int, int]) -> AnyImage:
    """Crop a PIL image or an array (..., H, W) to its largest central window of the proportions of `grid`, (height, width).

    Of a square grid that is the largest central square. An odd margin leaves its extra pixel at the bottom or right.
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[:-3:-1]
    tall, wide = max(1, min(height, width * grid[0] // grid[1])), max(1, min(width, height * grid[1] // grid[0]))
    if (tall, wide) == (height, width):
        return image
    top, left = (height - tall) // 2, (width - wide) // 2
    if isinstance(image, Image.Image):
        return image.crop((left, top, left + wide, top + tall))
    return image[..., top : top + tall, left : left + wide]


def _reduce_pil_depth(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    highest = values.max(initial=0)
    if image.mode == "F":
        top = 255 if highest > 1 else 1
    else:
        top = 255 if image.mode == "I" and highest <= 255 else 65535
    if values.size and not (values.min() >= 0 and highest <= top):
        raise ValueError(
            f"An image of mode {image.mode} has values from {values.min():.4g} to {highest:.4g}, outside 0..{top}: "
            "rescale it first."
        )
    levels = np.rint(values * (255 / top)).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels)


def _reduce_array_depth(image: ImageArray) -> ImageArray:
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise _shape_error(image)
    if is_eight_bit(image):
        return image
    if is_floating(image):
        is_single = image.dtype.itemsize <= 4
        if torch.is_tensor(image):
            image = image.detach().to(torch.float32 if is_single else torch.float64)
        else:
            image = image.astype(np.float32 if is_single else np.float64, copy=False)
        if not (math.isfinite(image.min()) and math.isfinite(image.max())):
            raise ValueError("An image of floats has values that are NaN or infinite: replace them first.")
        return image
    is_boolean = image.dtype in (bool, torch.bool)
    is_integer = image.dtype in _TORCH_INTEGERS if torch.is_tensor(image) else image.dtype.kind in "iu"
    if not is_boolean and not is_integer:
        raise ValueError(f"An image array holds booleans, integers or floats; found {image.dtype}.")
    wide = image.long() if torch.is_tensor(image) else image  # torch has no minimum of some of its integers
    if not is_boolean and (wide.min() < 0 or wide.max() > 255):
        raise ValueError(
            f"An integer image ({image.dtype}) has values from {wide.min()} to {wide.max()}, outside the grey levels "
            "0..255: rescale it first."
        )
    image = image.to(torch.uint8) if torch.is_tensor(image) else image.astype(np.uint8)
    return image * 255 if is_boolean else image


def _shape_error(image: ImageArray) -> ValueError:
    return ValueError(
        f"An image array has shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels; found {tuple(image.shape)}."
    )


def _convert_pil_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("La", "RGBa"):  # premultiplied, which PIL converts to no other modes
        image = image.convert(image.mode.upper())
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    try:
        image = image.convert("RGBA")
    except (
        TypeError,
        ValueError,
    ) as error:  # PIL takes bytes for palettes alone, and no more of them than there are colours
        found = reprlib.repr(image.info["transparency"])
        raise ValueError(
            f"An image of mode {image.mode} has no transparency such as {found} ({error}): correct or delete its "
            '`info["transparency"]`.'
        ) from error
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _convert_array_to_rgb(image: ImageArray, layout: ChannelDimension | str | None) -> ImageArray:
    if image.ndim == 2:
        image = image[None]
    elif find_layout(image, layout) == ChannelDimension.LAST:
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
