"""Images to tokens and back: `ImageGPTImageProcessor` (torchvision backend) and `ImageGPTImageProcessorPil` (PIL backend).

Both find the exact nearest colour of each pixel and share all code except the resizing. The two backends round their
resizing filters differently, so the tokens of a resized photo may differ between them.
"""

import os
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, TypeAlias, Union

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available, logging

from .clusters import check_palette, colors_of, nearest_color, nearest_color_of_codes
from .configuration_imagegpt import ImageGPTConfig
from .inputs_imagegpt import IGNORE_INDEX
from .pixels_imagegpt import (
    AnyImage,
    ImageSource,
    convert_to_rgb,
    crop_to_proportions,
    find_layout,
    is_eight_bit,
    is_floating,
    open_image,
    reduce_depth,
    to_channels_first,
    to_pixels,
    to_rgb_image,
)
from .presets import IMAGE_SIZE, MAX_SIDE


# (height, width) in pixels, a mapping with these keys, or one number for a square.
ImageSize: TypeAlias = Sequence[int] | Mapping[str, int] | SizeDict | int

_NUMBERS = {  # option -> what it is, what it is above
    "rescale_factor": ("a positive number", 0),
    "image_mean": ("a number, or one for each channel", -inf),
    "image_std": ("a positive number, or one for each channel", 0),
}
_MISSING_GREY = 128
_FILTERS = frozenset(PILImageResampling)
_FARTHEST_COLOR = 3  # from 0, on the palette's scale: other means and deviations than ours go beyond 1, but not so far

logger = logging.get_logger(__name__)


class ImageGPTImageProcessorKwargs(ImagesKwargs, total=False):
    """
    clusters (array-like of shape (K, 3), *optional*):
        The palette: RGB colours in [-1, 1].
    do_color_quantize (`bool`, *optional*, defaults to `True`):
        Whether to return `input_ids`, the nearest colour of each pixel, or else `pixel_values`.
    """

    clusters: Union[np.ndarray, list[Any], "torch.Tensor"] | None
    do_color_quantize: bool | None


class _ColorQuantization(BaseImageProcessor):
    """The code that both backends share: the palette, conversion of images to 8-bit RGB, quantisation and its inverse."""

    model_input_names = ["input_ids"]
    valid_kwargs = ImageGPTImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    do_resize = True
    size: dict[str, int] | SizeDict = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    crop_size: SizeDict | None
    do_convert_rgb = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_color_quantize = True
    clusters: np.ndarray | None = None

    def __init__(self, clusters: ArrayLike | None = None, **kwargs: Any) -> None:
        super().__init__(clusters=None if clusters is None else check_palette(clusters), **kwargs)
        _check_options(vars(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a processor as transformers does; what its file cannot hold is a ValueError that names it."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{pretrained_model_name_or_path}, preprocessor_config.json: {error}") from error

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        options = dict(image_processor_dict)
        if options.get("do_center_crop") and options.get("crop_size") == options.get("size"):
            options["crop_size"] = None  # the largest window, for which `to_dict` writes the size
        return super().from_dict(options, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if output.get("clusters") is not None:
            output["clusters"] = np.asarray(output["clusters"]).tolist()  # float64: JSON keeps every bit
        if output.get("do_center_crop") and output.get("crop_size") is None and "height" in output["size"]:
            # transformers' processors refuse to crop without a size; a crop to the size after resizing changes nothing.
            output["crop_size"] = output["size"]
        return output

    def fetch_images(
        self, image_url_or_urls: ImageSource | Sequence[Any], timeout: float | None = None
    ) -> AnyImage | list[Any]:
        """Read an image, or each image of a list, as `open_image` does, in both backends with PIL.

        timeout: in seconds, for downloads. An image that cannot be read is a ValueError that names it.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [
                self.fetch_images(image, timeout) if isinstance(image, (list, tuple)) else _fetch(image, index, timeout)
                for index, image in enumerate(image_url_or_urls)
            ]
        return _fetch(image_url_or_urls, 0, timeout)  # type: ignore[arg-type]  # no list

    def preprocess(self, images: str | ImageInput | Sequence[Any], *args: Any, **kwargs: Any) -> BatchFeature:
        """Convert images to tokens; see `ImageGPTImageProcessorPil`. Keyword arguments override the processor's options."""
        if args or kwargs.keys() - {"return_tensors"}:
            _check_options(self._standardize_kwargs(**kwargs))
            return super().preprocess(images, *args, **kwargs)
        # This is the base class's method without its type check of the given options. Even if none are given, the check
        # takes as long as tokenising a small image.
        options = {name: getattr(self, name) for name in self.valid_kwargs.__annotations__} | kwargs
        options = self._standardize_kwargs(**options)
        self._validate_preprocess_kwargs(**options)
        return self._preprocess_image_like_inputs(images, **options)  # type: ignore[arg-type]  # takes paths too

    def _prepare_images_structure(  # type: ignore[override]  # always a list here
        self, images: str | ImageInput | Sequence[Any], expected_ndims: int = 3
    ) -> list[AnyImage]:
        if isinstance(images, (list, tuple)) and len(images) == 0:
            raise ValueError("No images: the list is empty.")
        batch = _flatten(self.fetch_images(images))
        if len(batch) == 0:
            raise ValueError("No images: the input holds none.")
        for index, image in enumerate(batch):
            shape = image.size if isinstance(image, Image.Image) else image.shape
            if 0 in shape:
                raise ValueError(f"Image {index} is empty: its shape is {tuple(shape)}.")
        return batch

    def process_image(
        self,
        image: AnyImage,
        do_convert_rgb: bool | None = None,
        input_data_format: ChannelDimension | str | None = None,
        **kwargs: Any,
    ) -> AnyImage:
        """Convert one image to 8 bits, to RGB if `do_convert_rgb` is set, and to the backend's array (C, H, W).

        The conversion to RGB is not transformers' own, which differs between its versions.
        """
        image = reduce_depth(image)
        if do_convert_rgb:
            image, input_data_format = convert_to_rgb(image, input_data_format), ChannelDimension.FIRST
        elif not isinstance(image, Image.Image) and image.ndim == 3:
            input_data_format = find_layout(image, input_data_format)
        if isinstance(image, np.ndarray):
            image = np.array(image, order="C")  # torch takes no views that run backwards or are read-only
        return super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)

    def _validate_preprocess_kwargs(  # type: ignore[override]  # the named options are those checked here
        self,
        do_center_crop: bool | None = None,
        crop_size: SizeDict | None = None,
        resample: PILImageResampling | int | None = None,
        do_color_quantize: bool | None = None,
        clusters: ArrayLike | None = None,
        **kwargs: Any,
    ) -> None:
        if resample not in _FILTERS:
            _check_options({"resample": resample})
        # Without a crop size the crop is the largest window, so transformers' check, which requires one, is left out.
        do_center_crop = do_center_crop and crop_size is not None
        super()._validate_preprocess_kwargs(
            do_center_crop=do_center_crop, crop_size=crop_size, resample=resample, **kwargs
        )
        if do_color_quantize and clusters is None:
            raise ValueError(
                "This image processor has no palette. Pass `clusters`, an array (K, 3) of RGB colours in [-1, 1]; "
                "scripts/run_clusters.py fits one to your images."
            )

    def _preprocess(
        self,
        images: list[AnyImage],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_center_crop: bool,
        crop_size: SizeDict | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        return_tensors: str | None,
        do_color_quantize: bool = True,
        clusters: ArrayLike | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Crop, resize and quantise the results of `process_image`: `input_ids` (B, N) int64, or `pixel_values`.

        The largest central window of the proportions of `size`, a square if these are equal, is cropped before resizing. If
        `crop_size` differs from `size`, the order and meaning are transformers': resize, then crop to `crop_size`.
        """
        if do_rescale and any(_looks_rescaled(image) for image in images):
            logger.warning_once(
                "The images are floats within [-1, 1], which do_rescale takes for grey levels 0 to 255: all will be black. "
                "Pass do_rescale=False, or 8-bit images."
            )
        crop_first = do_center_crop and (crop_size is None or crop_size == size)
        proportions = (size.height or 1, size.width or 1)
        sized = []
        for image in images:
            if crop_first:
                image = crop_to_proportions(image, proportions)
            if do_resize:
                image = self.resize(image, size, resample)  # type: ignore[attr-defined]  # a method of both backends
            if do_center_crop and not crop_first:
                image = self.center_crop(to_channels_first(image), crop_size)  # type: ignore[arg-type]  # the backend's types
            sized.append(image)

        def normalize_levels(image: Any) -> Any:
            image = to_channels_first(image)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                if torch.is_tensor(image) and not image.is_floating_point():
                    image = image.float()  # torchvision does not normalise integers
                image = self.normalize(image, image_mean, image_std)
            return image

        if not do_color_quantize:
            pixel_values = [normalize_levels(image) for image in sized]
            return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)
        can_look_up = _normalizes_to_palette_range(do_rescale, rescale_factor, do_normalize, image_mean, image_std)

        def to_palette_range(index: int, image: Any) -> Any:
            channels = to_channels_first(image)
            if len(channels) != 3:
                raise ValueError(f"Image {index} has {len(channels)} channels, not RGB: pass do_convert_rgb=True.")
            if can_look_up and is_eight_bit(image):
                return image
            image = normalize_levels(image)
            low, high = float(image.min()), float(image.max())
            if max(-low, high) > _FARTHEST_COLOR:
                raise ValueError(
                    f"Image {index} has values from {low:.4g} to {high:.4g} where the palette's colours lie in [-1, 1]: pass "
                    "do_rescale=True for floats in 0..255, and False for floats in [0, 1]."
                )
            return image

        pixels = [
            image if can_look_up and isinstance(image, Image.Image) else to_palette_range(index, image)
            for index, image in enumerate(sized)
        ]
        features = BatchFeature(
            {"input_ids": _quantize_images(pixels, np.asarray(clusters))}, tensor_type=return_tensors
        )
        if return_tensors == "pt" and torch.is_tensor(sized[0]):
            features["input_ids"] = features["input_ids"].to(sized[0].device)
        return features

    @property
    def palette(self) -> np.ndarray:
        """The palette (K, 3), RGB colours in [-1, 1]; a processor without one raises ValueError."""
        if self.clusters is None:
            raise ValueError("This image processor has no palette: pass `clusters` when creating it.")
        return self.clusters

    def decode(
        self,
        input_ids: torch.Tensor | np.ndarray | Sequence[Any],
        size: ImageSize | None = None,
        missing: str = "transparent",
        scale: int = 1,
    ) -> list[Image.Image]:
        """Turn tokens back into a list of B PIL images: the inverse of quantisation, up to the palette's distortion.

        input_ids: (B, N) or (N,), torch, numpy or lists, in 0..K-1. A leading SOS (K), and in front of a whole image also a
        class (> K), is dropped, so that the output of `generate()` can be passed directly. Rows shorter than H·W are partial
        images in raster order; missing pixels, and every token -100, become transparent (the image is then RGBA) or, with
        `missing="grey"`, mid-grey. size: the images' size, as in `token_grid`, if it is not the processor's own. scale: the
        side, in pixels of the result, of the square that each token becomes. Tokens out of range, or more than fit the size,
        are a ValueError.
        """
        palette = self.palette
        if missing not in ("transparent", "grey"):
            raise ValueError(f'`missing` is "transparent" or "grey"; found {missing!r}.')
        if not (isinstance(scale, int) and scale >= 1):
            raise ValueError(f"scale is a whole number from 1; found {scale!r}.")
        height, width = self.token_grid(size)
        if len(input_ids) == 0:
            return []
        n_pixels, n_colors = height * width, len(palette)
        images = []
        for row in [input_ids] if np.ndim(input_ids[0]) == 0 else input_ids:
            tokens = np.asarray(row.cpu() if torch.is_tensor(row) else row)
            if not np.issubdtype(tokens.dtype, np.integer):
                raise ValueError(f"Tokens are integers; found {tokens.dtype}.")
            tokens = tokens.astype(np.int64)
            if len(tokens) and (tokens[0] == n_colors or (len(tokens) == n_pixels + 1 and tokens[0] > n_colors)):
                tokens = tokens[1:]
            if len(tokens) > n_pixels:
                raise ValueError(
                    f"{len(tokens)} tokens do not fit an image of {height}x{width} = {n_pixels} pixels: pass `size`."
                )
            known = np.zeros(n_pixels, dtype=bool)
            known[: len(tokens)] = tokens != IGNORE_INDEX
            pixels = np.full((n_pixels, 3), _MISSING_GREY, dtype=np.uint8)
            pixels[known] = colors_of(tokens[known[: len(tokens)]], palette)
            if missing == "transparent" and not known.all():
                alpha = np.where(known, 255, 0).astype(np.uint8)
                pixels = np.concatenate([pixels, alpha[:, None]], axis=1)
            pixels = pixels.reshape(height, width, -1).repeat(scale, axis=0).repeat(scale, axis=1)
            images.append(Image.fromarray(pixels))
        return images

    def token_grid(self, size: ImageSize | None = None) -> tuple[int, int]:
        """Return the (height, width), in pixels, of the images that tokens form: `size`, or the processor's own.

        size: (height, width), a mapping with these keys, or one number for a square. ValueError if `size` is None and the
        processor's options do not determine it.
        """
        if size is None and self.do_center_crop and self.crop_size is not None:
            size = self.crop_size
        elif size is None:
            size = self.size if self.do_resize else {}
        if isinstance(size, (Mapping, SizeDict)):
            if not (size.get("height") and size.get("width")):
                raise ValueError("The processor's options do not fix the height and width of its images: pass `size`.")
            return size["height"], size["width"]
        sides: Any = (size, size) if np.ndim(size) == 0 else size
        height, width = sides
        return int(height), int(width)

    def check_fits(self, config: ImageGPTConfig) -> None:
        """Raise ValueError unless a model with `config` reads as many pixels and colours as this processor makes."""
        height, width = self.token_grid()
        n_colors, found = config.vocab_size - 1, 0 if self.clusters is None else len(self.clusters)
        if (height * width, found) != (config.n_positions, n_colors):
            raise ValueError(
                f"The model reads images of {config.n_positions} pixels and {n_colors} colours; the image processor makes "
                f"{height}x{width} of {found or 'no'} colours: use the processor the model was trained with."
            )


class ImageGPTImageProcessor(_ColorQuantization, TorchvisionBackend):  # type: ignore[misc]  # ours take PIL images too
    """Convert images to tokens with torchvision. The options are those of `ImageGPTImageProcessorPil`.

    If torchvision is not installed, creating one gives an `ImageGPTImageProcessorPil` and a warning.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if InstalledProcessor is ImageGPTImageProcessor:
            return super().__new__(cls)
        logger.warning_once(
            f"{cls.__name__} needs torchvision, which is not installed: ImageGPTImageProcessorPil is used."
        )
        return InstalledProcessor(*args, **kwargs)


class ImageGPTImageProcessorPil(_ColorQuantization, PilBackend):  # type: ignore[misc]  # ours take PIL images too
    """Convert images to tokens with PIL.

    Call it with one image or a list of images of any size: PIL images of any mode, numpy or torch arrays (H, W, C) or
    (C, H, W), paths, URLs, base64 or the bytes of files. Returns `input_ids` (B, N) int64, N = height·width in raster order, values 0..K-1.
    Images are turned upright by their EXIF tag, transparency is composited onto white, 16-bit images are scaled to 8 bits,
    and more pixels than `PIL.Image.MAX_IMAGE_PIXELS` are a ValueError: `pixels_imagegpt` says what every image becomes.

    clusters: the palette, (K, 3) RGB colours in [-1, 1]. size: the token grid, height x width, 32x32 by default.
    do_center_crop: crop the largest central window of the grid's proportions (of a square grid: the largest square) before
    resizing, so that photos keep theirs (False by default, as in transformers). The other options are those of transformers' own ImageGPT processors. A palette of the wrong shape or
    range, and an empty or unreadable image (named by index or path), are a ValueError.
    """

    def process_image(  # type: ignore[override]  # PIL images too
        self,
        image: AnyImage,
        do_convert_rgb: bool | None = None,
        input_data_format: ChannelDimension | str | None = None,
        **kwargs: Any,
    ) -> AnyImage:
        """Convert one image to 8-bit RGB. PIL images stay PIL images, which are quantised without further copies."""
        if not do_convert_rgb:
            return super().process_image(image, do_convert_rgb, input_data_format, **kwargs)
        image = convert_to_rgb(reduce_depth(image), input_data_format)
        return image.cpu().numpy() if torch.is_tensor(image) else image

    def resize(  # type: ignore[override]  # PIL images too
        self, image: AnyImage, size: SizeDict, resample: PILImageResampling | int | None = None, **kwargs: Any
    ) -> AnyImage:
        """Resize a PIL image or an array (C, H, W). Every 8-bit RGB image becomes a PIL image if its size changes."""
        if isinstance(image, Image.Image):
            shape, is_rgb = image.size[::-1], True
        else:
            shape, is_rgb = tuple(image.shape[1:]), is_eight_bit(image) and len(image) == 3
        if is_eight_bit(image) and shape == (size.height, size.width):
            return image
        if size.height and size.width and is_rgb and resample in _FILTERS:
            return to_rgb_image(image, ChannelDimension.FIRST).resize((size.width, size.height), resample)
        array: Any = to_channels_first(image)
        return super().resize(array, size, resample, **kwargs)  # type: ignore[arg-type]  # filters given as int


# The class that AutoImageProcessor chooses; before transformers 5.2x, AutoImageProcessor itself needs torchvision.
InstalledProcessor = ImageGPTImageProcessor if is_torchvision_available() else ImageGPTImageProcessorPil

AnyImageProcessor: TypeAlias = ImageGPTImageProcessor | ImageGPTImageProcessorPil


def _fetch(source: ImageSource, index: int, timeout: float | None) -> AnyImage:
    """Read one image; its name in messages is its path or URL, or else `index`."""
    try:
        return open_image(source, timeout)
    except ValueError as error:
        is_name = isinstance(source, (str, os.PathLike))
        name = str(source)[:200] if is_name else getattr(source, "filename", "") or index
        raise ValueError(f"Image {name} cannot be read: {error}") from error


def _flatten(images: Any) -> list[AnyImage]:
    """Return the images in nested lists and in arrays (B, ...) of images."""
    if isinstance(images, Image.Image) or (not isinstance(images, (list, tuple)) and images.ndim <= 3):
        return [images]
    flat: list[AnyImage] = []
    for image in images:
        flat += (image,) if isinstance(image, Image.Image) else _flatten(image)
    return flat


def _check_options(options: Mapping[str, Any]) -> None:
    """ValueError if an option is of a wrong type, no finite number, or asks for more pixels than any image should have."""
    for name, value in options.items():
        if isinstance(value, SizeDict):
            for side, length in vars(value).items():
                most = MAX_SIDE**2 if side.endswith("pixels") else MAX_SIDE
                if length is not None and not (type(length) is int and 1 <= length <= most):
                    raise ValueError(f"{name}: {side} is a whole number from 1 to {most}; found {length!r:.50}.")
        elif name.startswith("do_") and not isinstance(value, (bool, type(None))):
            raise ValueError(f"{name} is true or false; found {value!r:.50}.")
        elif name == "resample" and isinstance(value, (int, float, str, list, dict)):  # torchvision's are neither
            if not isinstance(value, int) or value not in _FILTERS:
                raise ValueError(
                    f"resample is one of PIL's resampling filters, {[*PILImageResampling]}; found {value!r:.50}."
                )
        elif name in _NUMBERS and value is not None:
            what, least = _NUMBERS[name]
            is_list = (
                isinstance(value, (list, tuple, np.ndarray)) and len(value) in (1, 3, 4) and name != "rescale_factor"
            )
            for number in value if is_list else [value]:
                if not (isinstance(number, (int, float, np.number)) and number is not True and least < number < inf):
                    raise ValueError(f"{name} is {what}; found {value!r:.50}.")


def _normalizes_to_palette_range(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
) -> bool:
    """Whether 8-bit colours can be looked up: the options map 0..255, or without do_rescale 0..1, to the palette's [-1, 1].

    Without do_rescale floats are in [0, 1]; 8-bit images mean the same colours.
    """
    return bool(
        (do_normalize and (not do_rescale or abs(rescale_factor * 255 - 1) < 1e-12))
        and all(
            values == (0.5,) * 3 if type(values) is tuple else set(np.atleast_1d(values)) == {0.5}
            for values in (image_mean, image_std)
        )
    )


def _looks_rescaled(image: AnyImage) -> bool:
    """Whether an array of floats seems to hold grey levels that were already divided by 255."""
    if isinstance(image, Image.Image) or not is_floating(image):
        return False
    return bool(image.min() >= -1 and 0 < image.max() <= 1)


def _quantize_images(images: list[AnyImage], clusters: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """Return the tokens of RGB images, each PIL or an array (3, H, W): (B, N) int64, or a list of (N,) if N differs.

    Arrays hold grey levels if they are uint8, and colours on the palette's scale otherwise.
    """
    pil_images = [image for image in images if isinstance(image, Image.Image)]
    if len(pil_images) == len(images) and len({image.size for image in pil_images}) == 1:
        return nearest_color_of_codes(_pack_colors(pil_images), clusters).reshape(len(images), -1)
    arrays = [to_pixels(image) for image in images]
    if len({(array.shape, array.dtype) for array in arrays}) == 1:
        arrays = [np.concatenate(arrays)]  # one look-up is faster
    if any(array.dtype != np.uint8 for array in arrays):
        clusters = check_palette(clusters)  # the look-up table checks its own palette
    tokens = [nearest_color(array, clusters).reshape(-1) for array in arrays]
    same_length = len({len(row) for row in tokens}) == 1
    return np.concatenate(tokens).reshape(len(images), -1) if same_length else tokens


def _pack_colors(images: list[Image.Image]) -> np.ndarray:
    """Pack each colour of RGB images of one size into a number, R << 16 | G << 8 | B: uint32 (B·H·W,).

    The images are pasted into one tall image first, because converting each to numpy is slow.
    """
    width, height = images[0].size
    column = images[0]
    if len(images) > 1:
        column = Image.new("RGB", (width, height * len(images)))
        for row, image in enumerate(images):
            column.paste(image, (0, row * height, width, (row + 1) * height))
    return np.frombuffer(column.tobytes("raw", "BGRX"), "<u4")


__all__ = ["ImageGPTImageProcessor", "ImageGPTImageProcessorPil"]
