"""Images to tokens and back: `ImageGPTImageProcessor` (torchvision backend) and `ImageGPTImageProcessorPil` (PIL).

Both give the exact nearest colour of each pixel and share every line but the resizing, which is their backend's: the
two backends' filters round differently, so a photo's tokens may differ between them where a resized pixel does.
"""

import os
from typing import Union

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    is_pil_image,
    load_image,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available, logging

from .clusters import check_palette, colors_of, nearest_color, nearest_color_of_codes
from .presets import IMAGE_SIZE


IGNORE_INDEX = -100  # marks a missing pixel in what `decode` is given, as it marks an unscored one in labels
_MISSING_GREY = 128
_FILTERS = frozenset(PILImageResampling)

logger = logging.get_logger(__name__)


class ImageGPTImageProcessorKwargs(ImagesKwargs, total=False):
    """
    clusters (array-like of shape (K, 3), *optional*):
        The palette: RGB colours in [-1, 1].
    do_color_quantize (`bool`, *optional*, defaults to `True`):
        Whether to return `input_ids`, the nearest colour of each pixel, or else `pixel_values`.
    """

    clusters: Union[np.ndarray, list, "torch.Tensor"] | None
    do_color_quantize: bool | None


class _ColorQuantization:
    """What both backends share: the palette, every kind of input made 8-bit RGB, quantisation and its inverse."""

    model_input_names = ["input_ids"]
    valid_kwargs = ImageGPTImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    do_resize = True
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    do_convert_rgb = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_color_quantize = True
    clusters = None
    _checked_options = (), None

    def __init__(self, clusters=None, **kwargs):
        super().__init__(clusters=None if clusters is None else check_palette(clusters), **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict, **kwargs):
        options = dict(image_processor_dict)
        if options.get("do_center_crop") and options.get("crop_size") == options.get("size"):
            options["crop_size"] = None  # the largest square, as `to_dict` writes it
        return super().from_dict(options, **kwargs)

    def fetch_images(self, image_url_or_urls):
        """Images behind paths and URLs, by PIL in both backends. One that cannot be read is a ValueError naming it."""
        if isinstance(image_url_or_urls, (list, tuple)) and not any(
            isinstance(image, (str, list, tuple)) for image in image_url_or_urls
        ):
            return image_url_or_urls  # images already; whether they are is seen later
        if not isinstance(image_url_or_urls, str):
            try:
                return super().fetch_images(image_url_or_urls)
            except TypeError as error:
                raise ValueError(
                    f"Images are PIL images, arrays, paths or URLs, or lists of these; found {type(image_url_or_urls).__name__}."
                ) from error
        from PIL import Image, ImageOps

        try:
            if not os.path.isfile(image_url_or_urls):
                return load_image(image_url_or_urls)  # a URL or base64
            # Not load_image: its conversion to RGB loses transparency and clips 16-bit images.
            return ImageOps.exif_transpose(Image.open(image_url_or_urls))
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot read the image {image_url_or_urls[:200]}: {error}") from error

    def _prepare_images_structure(self, images, expected_ndims: int = 3):
        if isinstance(images, (list, tuple)) and len(images) == 0:
            raise ValueError("No images: an empty list was given.")
        batch = list(images) if isinstance(images, (list, tuple)) else [images]
        if all(
            (image.ndim == expected_ndims and image.size)
            if type(image) is np.ndarray
            else is_pil_image(image) and 0 not in image.size
            for image in batch
        ):
            return batch  # the frequent kinds, that leave no question
        batch = [image[None] if getattr(image, "ndim", None) == 2 else image for image in batch]  # (1, H, W): grey
        try:
            images = super()._prepare_images_structure(
                batch if len(batch) > 1 else batch[0], expected_ndims=expected_ndims
            )
        except ValueError as error:  # it may print all pixels
            raise ValueError(str(error)[:300]) from error
        if len(images) == 0:
            raise ValueError("No images: what was given holds none.")
        for index, image in enumerate(images):
            shape = image.size if is_pil_image(image) else image.shape
            if 0 in shape:
                raise ValueError(f"Image {index} is empty: its shape is {tuple(shape)}.")
        return images

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        # The call without options is the frequent one: transformers' checks of them would take longer than the tokens.
        if args or not kwargs.keys() <= {"return_tensors"}:
            return super().preprocess(images, *args, **kwargs)
        return self._preprocess_image_like_inputs(images, **(self._own_options() | kwargs))

    def _own_options(self) -> dict:
        """The processor's own options as `preprocess` passes them on, checked whenever one of them is a new object."""
        values = [getattr(self, name, None) for name in self._valid_kwargs_names]
        checked, options = self._checked_options
        if options is None or any(a is not b for a, b in zip(values, checked, strict=True)):
            options = self._standardize_kwargs(**dict(zip(self._valid_kwargs_names, values, strict=True)))
            self._validate_preprocess_kwargs(**options)
            if not any(
                isinstance(value, (dict, list)) for value in values
            ):  # which may change and stay the same object
                self._checked_options = values, options
        return options

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_checked_options"}

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs):
        # The conversion to RGB is ours: transformers' own has changed between versions.
        if is_pil_image(image):
            image = _eight_bit(image)
            image = _rgb(image) if do_convert_rgb else image
        else:
            image = _eight_bit_array(image)
            image = _rgb_array(image, input_data_format) if do_convert_rgb else image
        return super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)

    def _validate_preprocess_kwargs(self, do_center_crop=None, crop_size=None, **kwargs):
        # Without a crop size the crop is the largest square, so none is required.
        super()._validate_preprocess_kwargs(
            do_center_crop=do_center_crop and crop_size is not None, crop_size=crop_size, **kwargs
        )
        resample = kwargs.get("resample")
        if isinstance(resample, int) and resample not in _FILTERS:
            raise ValueError(
                f"resample is one of {[*PILImageResampling]}, a resampling filter of PIL; found {resample}."
            )
        if kwargs.get("do_color_quantize") and kwargs.get("clusters") is None:
            raise ValueError(
                "This image processor has no palette. Pass `clusters`, an array (K, 3) of RGB colours in [-1, 1]; "
                "scripts/run_clusters.py fits one to your images."
            )

    def _preprocess(
        self,
        images,
        do_resize,
        size,
        resample,
        do_center_crop,
        crop_size,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        return_tensors,
        do_color_quantize=True,
        clusters=None,
        **kwargs,
    ) -> BatchFeature:
        """`images`: list of (C, H, W) arrays of the backend. Returns `input_ids` (B, N) int64, or `pixel_values`.

        Order: centre crop to the largest square, resize, quantise. With a `crop_size` other than `size`, transformers'
        order and meaning hold instead: resize, then crop to `crop_size`.
        """
        if do_rescale and any(_is_rescaled(image) for image in images):
            logger.warning_once(
                "Images of floats in [0, 1] were given, and do_rescale takes them as grey levels 0 to 255: all will be "
                "black. Pass do_rescale=False, or 8-bit images."
            )
        square = do_center_crop and (crop_size is None or crop_size == size)
        sized = []
        for image in images:
            if square:
                image = _largest_central_square(image)
            if do_resize:
                image = self.resize(image, size, resample)
            if do_center_crop and not square:
                image = self.center_crop(image, crop_size)
            sized.append(image)

        def normalized(image):
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                if torch.is_tensor(image) and not image.is_floating_point():
                    image = image.float()  # torchvision normalises no integers
                image = self.normalize(image, image_mean, image_std)
            return image

        if not do_color_quantize:
            return BatchFeature({"pixel_values": [normalized(image) for image in sized]}, tensor_type=return_tensors)

        eight_bits = _is_unit_range(do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        pixels = []
        for image in sized:
            if not (eight_bits and image.dtype in (np.uint8, torch.uint8)):
                image = normalized(image)
            pixels.append(np.moveaxis(np.asarray(image.cpu() if torch.is_tensor(image) else image), 0, -1))
        tokens = _tokens(pixels, check_palette(clusters))
        features = BatchFeature({"input_ids": tokens}, tensor_type=return_tensors)
        if return_tensors == "pt" and torch.is_tensor(sized[0]):
            features["input_ids"] = features["input_ids"].to(sized[0].device)
        return features

    def decode(self, input_ids, size=None, missing: str = "transparent") -> list:
        """Tokens back to images: the inverse of the quantisation, up to the palette's distortion.

        input_ids: (B, N) or (N,), torch, numpy or lists, in 0..K-1. A leading SOS (K) is dropped, so `generate()`'s
        output decodes as it is. Rows shorter than H·W are partial images in raster order; what is missing, and every
        token −100, becomes transparent (the image is then RGBA) or, with `missing="grey"`, mid-grey.
        size: as `token_grid` takes it, if the tokens are not of the processor's own grid.
        Returns a list of B PIL images.
        """
        from PIL import Image

        if self.clusters is None:
            raise ValueError("This image processor has no palette to decode with: pass `clusters` when creating it.")
        if missing not in ("transparent", "grey"):
            raise ValueError(f'`missing` is "transparent" or "grey"; found {missing!r}.')
        height, width = self.token_grid(size)
        if len(input_ids) == 0:
            return []
        rows = [input_ids] if np.ndim(input_ids[0]) == 0 else input_ids
        n_colors = len(self.clusters)
        images = []
        for row in rows:
            tokens = np.asarray(row.cpu() if torch.is_tensor(row) else row)
            if not np.issubdtype(tokens.dtype, np.integer):
                raise ValueError(f"Tokens are integers; found {tokens.dtype}.")
            tokens = tokens.astype(np.int64)
            if len(tokens) and tokens[0] == n_colors:
                tokens = tokens[1:]
            if len(tokens) > height * width:
                raise ValueError(
                    f"{len(tokens)} tokens do not fit an image of {height}x{width} = {height * width} pixels: pass `size`."
                )
            known = np.zeros(height * width, dtype=bool)
            known[: len(tokens)] = tokens != IGNORE_INDEX
            pixels = np.full((height * width, 3), _MISSING_GREY, dtype=np.uint8)
            pixels[known] = colors_of(tokens[known[: len(tokens)]], self.clusters)
            if missing == "transparent" and not known.all():
                alpha = np.where(known, 255, 0).astype(np.uint8)
                pixels = np.concatenate([pixels, alpha[:, None]], axis=1)
            images.append(Image.fromarray(pixels.reshape(height, width, -1)))
        return images

    def token_grid(self, size=None) -> tuple[int, int]:
        """(height, width) in pixels of the images that tokens form: `size`, or what the processor makes of images.

        size: (height, width), a mapping with these keys, or one number for a square.
        """
        if size is None:
            cropped = self.do_center_crop and self.crop_size is not None
            size = self.crop_size if cropped else (self.size if self.do_resize else {})
        if hasattr(size, "get"):
            if not (size.get("height") and size.get("width")):
                raise ValueError("The processor's options fix no height and width of its images: pass `size`.")
            return size["height"], size["width"]
        height, width = (size, size) if np.ndim(size) == 0 else size
        return int(height), int(width)

    def check_fits(self, config):
        """ValueError unless this processor makes images of the pixels and colours that a model of `config` was made for."""
        height, width = self.token_grid()
        n_colors, has = config.vocab_size - 1, 0 if self.clusters is None else len(self.clusters)
        if (height * width, has) != (config.n_positions, n_colors):
            raise ValueError(
                f"The model reads images of {config.n_positions} pixels and {n_colors} colours; the image processor makes "
                f"{height}x{width} of {has or 'no'} colours: use the processor the model was trained with."
            )

    def to_dict(self):
        output = super().to_dict()
        output.pop("_checked_options", None)
        if output.get("clusters") is not None:
            output["clusters"] = np.asarray(output["clusters"]).tolist()  # float64: JSON keeps every bit
        if output.get("do_center_crop") and output.get("crop_size") is None and "height" in output["size"]:
            # transformers' processors refuse to crop without a size. A crop of the size resized to is none for them.
            output["crop_size"] = output["size"]
        return output


class ImageGPTImageProcessor(_ColorQuantization, TorchvisionBackend):
    """Images to tokens with torchvision. Options and methods as `ImageGPTImageProcessorPil`, which it is without torchvision."""

    def __new__(cls, *args, **kwargs):
        if InstalledProcessor is ImageGPTImageProcessor:
            return super().__new__(cls)
        logger.warning_once(
            f"{cls.__name__} needs torchvision, which is not installed: ImageGPTImageProcessorPil is used."
        )
        return InstalledProcessor(*args, **kwargs)


class ImageGPTImageProcessorPil(_ColorQuantization, PilBackend):
    """Images to tokens with PIL.

    Call it on one image or a list, of any size: PIL images of any mode, numpy or torch arrays (H, W, C) or (C, H, W),
    paths or URLs. Returns `input_ids` (B, N) int64, N = height·width in raster order, values 0..K-1. Transparency is
    composited onto white; 16-bit images are scaled to 8 bits.

    clusters: the palette, (K, 3) RGB colours in [-1, 1]. size: the token grid, 32x32 by default. do_center_crop: crop
    the largest central square before resizing, so that photos are not squashed (False by default, as in transformers).
    Other options as transformers' own ImageGPT processors. Errors are ValueErrors: a palette of wrong shape or range,
    an empty or unreadable image (its index or path).
    """

    def _preprocess_image_like_inputs(self, images, *args, **kwargs) -> BatchFeature:
        """As transformers', but images of 8 bits stay PIL images or uint8 until they are tokens: no copies in between."""
        if args or not self._keeps_eight_bits(**kwargs):
            return super()._preprocess_image_like_inputs(images, *args, **kwargs)
        images = self._prepare_images_structure(images)
        if not all(is_pil_image(image) or image.dtype in (np.uint8, torch.uint8) for image in images):
            return super()._preprocess_image_like_inputs(images, *args, **kwargs)
        size = (kwargs["size"].width, kwargs["size"].height) if kwargs["do_resize"] else None
        layout, resample, square = kwargs["input_data_format"], kwargs["resample"], kwargs["do_center_crop"]
        whole = size is not None and size[1] not in (1, 3, 4) and (size[0] == size[1] or not square)
        shape = (size[1], size[0], 3) if whole else None  # of an array that needs nothing, whose layout is plain
        pixels = []
        for image in images:
            if layout is None and type(image) is np.ndarray and image.shape == shape:
                pixels.append(image)
                continue
            image = _rgb(_eight_bit(image)) if is_pil_image(image) else _pixels(image, layout)
            pixels.append(_resized(image, size, resample, square))
        tokens = _tokens(pixels, np.asarray(kwargs["clusters"], dtype=np.float64))
        return BatchFeature({"input_ids": tokens}, tensor_type=kwargs["return_tensors"])

    def _keeps_eight_bits(
        self,
        do_color_quantize,
        do_convert_rgb,
        do_resize,
        size,
        resample,
        do_center_crop,
        crop_size,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        **kwargs,
    ) -> bool:
        """Whether PIL alone, at most cropping a square and resizing, makes of an image what is quantised."""
        return bool(
            (do_color_quantize and do_convert_rgb)
            and (not do_resize or (size.height and size.width and resample in _FILTERS))
            and (not do_center_crop or crop_size is None or crop_size == size)
            and _is_unit_range(do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        )


# What AutoImageProcessor picks; that class itself needs torchvision before transformers 5.2x.
InstalledProcessor = ImageGPTImageProcessor if is_torchvision_available() else ImageGPTImageProcessorPil


def _is_unit_range(do_rescale, rescale_factor, do_normalize, image_mean, image_std) -> bool:
    """Whether grey levels 0..255 become the palette's scale, [-1, 1], so that 8-bit colours can be looked up."""
    return bool(
        (do_rescale and do_normalize and abs(rescale_factor * 255 - 1) < 1e-12)
        and all(
            values == (0.5,) * 3 if type(values) is tuple else set(np.atleast_1d(values)) == {0.5}
            for values in (image_mean, image_std)
        )
    )


def _is_rescaled(image) -> bool:
    """Whether an array's floats look as if grey levels 0..255 had been divided by 255 already."""
    floats = image.is_floating_point() if torch.is_tensor(image) else image.dtype.kind == "f"
    return bool(floats and image.min() >= 0 and 0 < image.max() <= 1)


def _tokens(pixels: list, palette: np.ndarray):
    """Tokens of images, each PIL or an array (H, W, 3): (B, N) int64, or where their N differ a list of (N,).

    Arrays are of grey levels if uint8, else on the palette's scale, also beside each other.
    """
    kinds = {
        ((*image.size[::-1], 3), np.dtype(np.uint8)) if is_pil_image(image) else (image.shape, image.dtype)
        for image in pixels
    }
    if len(kinds) > 1:
        rows = [nearest_color(np.asarray(image), palette).reshape(-1) for image in pixels]
        return np.stack(rows) if len({len(row) for row in rows}) == 1 else rows
    if all(is_pil_image(image) for image in pixels):
        return nearest_color_of_codes(_codes(pixels), palette).reshape(len(pixels), -1)
    return nearest_color(np.concatenate(pixels), palette).reshape(len(pixels), -1)


def _codes(images: list) -> np.ndarray:
    """PIL images (mode RGB) of one size -> their colours as numbers R << 16 | G << 8 | B, uint32 (B·H·W,).

    By way of one tall image: numpy is slow to open many.
    """
    from PIL import Image

    width, height = images[0].size
    column = images[0]
    if len(images) > 1:
        column = Image.new("RGB", (width, height * len(images)))
        for row, image in enumerate(images):
            column.paste(image, (0, row * height, width, (row + 1) * height))
    return np.frombuffer(column.tobytes("raw", "BGRX"), "<u4")


def _pixels(image, input_data_format=None) -> np.ndarray:
    """An array of 8-bit greys, RGB or RGBA, in either layout -> uint8 (H, W, 3)."""
    image = np.asarray(_rgb_array(_eight_bit_array(image), input_data_format))
    layout = input_data_format or infer_channel_dimension_format(image, num_channels=3)
    return image if ChannelDimension(layout) == ChannelDimension.LAST else np.moveaxis(image, 0, -1)


def _resized(image, size: tuple[int, int] | None, resample: int, square: bool):
    """An RGB image, PIL or (H, W, 3), cropped to its largest central square and resized to (width, height), if asked to."""
    from PIL import Image

    if is_pil_image(image):
        if square and image.width != image.height:
            image = image.crop(_square_box(image.height, image.width))
        return image if size in (None, image.size) else image.resize(size, resample)
    if square:
        image = np.moveaxis(_largest_central_square(np.moveaxis(image, -1, 0)), 0, -1)
    if size in (None, image.shape[1::-1]):
        return image
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, resample))


def _largest_central_square(image):
    """(C, H, W) -> (C, S, S) with S = min(H, W); an odd margin leaves its extra pixel at the bottom or right."""
    left, top, right, bottom = _square_box(*image.shape[-2:])
    return image[..., top:bottom, left:right]


def _square_box(height: int, width: int) -> tuple[int, int, int, int]:
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return left, top, left + side, top + side


def _eight_bit(image):
    """A PIL image of a mode that holds more than 8 bits a channel -> mode L. Other modes pass.

    I;16 holds 16-bit greys. Mode I holds 8-bit greys if no pixel exceeds 255, else 16-bit ones; mode F 8-bit ones.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    top = 65535 if image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255) else 255
    if values.size and not (values.min() >= 0 and values.max() <= top):
        raise ValueError(
            f"An image of mode {image.mode} has values from {values.min():.4g} to {values.max():.4g}; "
            f"0..{top} is understood: rescale it first."
        )
    from PIL import Image

    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _rgb(image):
    """A PIL image -> mode RGB, transparency composited onto white."""
    from PIL import Image

    try:
        image.load()
    except OSError as error:  # of a file that is read only now
        raise ValueError(f"The image {getattr(image, 'filename', '')} cannot be read: {error}") from error
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def to_rgb_image(image):
    """A PIL image of any mode, or an integer array -> PIL image of mode RGB. Floats are a ValueError: their scale is unknown."""
    from PIL import Image

    if is_pil_image(image):
        return _rgb(_eight_bit(image))
    image = np.asarray(image)
    if np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"Images are of grey levels 0..255; found an array of {image.dtype}.")
    image = _rgb_array(_eight_bit_array(image[None] if image.ndim == 2 else image))
    return Image.fromarray(image if image.shape[-1] == 3 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _rgb_array(image, input_data_format=None):
    """An array of 1, 3 or 4 channels -> 3 channels in its layout: greys repeated, RGBA composited onto white."""
    layout = input_data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    axis = 0 if ChannelDimension(layout) == ChannelDimension.FIRST else 2
    n_channels = image.shape[axis]
    if n_channels == 3:
        return image
    library = torch if torch.is_tensor(image) else np
    if n_channels == 1:
        return library.concatenate([image] * 3, axis)
    floating = image.dtype not in (np.uint8, torch.uint8)
    if floating and (image.min() < 0 or image.max() > 1):
        raise ValueError(f"RGBA values of type {image.dtype} lie in [0, 1]; found {image.min()} to {image.max()}.")
    white = 1.0 if floating else 255.0
    color, alpha = (image[:3], image[3:]) if axis == 0 else (image[..., :3], image[..., 3:])
    alpha = alpha / white
    composite = alpha * color + (1 - alpha) * white
    composite = composite if floating else library.round(composite)
    return composite.to(image.dtype) if library is torch else composite.astype(image.dtype)


def _eight_bit_array(image):
    """A numpy or torch array: integers become uint8 grey levels, booleans 0 and 255; floats pass."""
    if image.ndim != 3 or not {image.shape[0], image.shape[-1]} & {1, 3, 4}:
        raise ValueError(
            f"An image array has shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels; found {tuple(image.shape)}."
        )
    is_torch = torch.is_tensor(image)
    if image.dtype in (bool, torch.bool):
        return image.to(torch.uint8) * 255 if is_torch else image.astype(np.uint8) * 255
    floating = image.is_floating_point() if is_torch else np.issubdtype(image.dtype, np.floating)
    if floating or image.dtype in (np.uint8, torch.uint8):
        return image
    if image.min() < 0 or image.max() > 255:
        raise ValueError(
            f"An integer image ({image.dtype}) has values from {image.min()} to {image.max()}; grey levels are 0..255: "
            "rescale it first."
        )
    return image.to(torch.uint8) if is_torch else image.astype(np.uint8)


__all__ = ["ImageGPTImageProcessor", "ImageGPTImageProcessorPil"]
