"""Pictures in the one form that loggers store: arrays of uint8, height x width x colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raytrainer.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["as_captions", "as_images", "as_values", "draw"]

_COLOURS = (1, 3, 4)


def as_images(images: Any) -> list[NDArray[np.uint8]]:
    """Pictures as arrays of shape (height, width, 3), or 4 with transparency.

    Args:
        images: One picture or a list of them; a 4-d tensor or array is a batch. Tensors have colours first
            (C, H, W), arrays have them last (H, W, C), unless only the other reading is possible; (H, W) is grey.
            Integers are from 0 to 255, floats from 0 to 1 (what is outside is cut off). Pillow's images do as well.

    Raises:
        ConfigurationError: It is no picture; says what it is.
    """
    if isinstance(images, (list, tuple)):
        return [array for image in images for array in as_images(image)]
    if getattr(images, "ndim", None) == 4:
        return [_as_image(image) for image in images]
    return [_as_image(images)]


def _as_image(image: Any) -> NDArray[np.uint8]:
    import numpy as np

    first = isinstance(image, Tensor)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    elif hasattr(image, "convert"):  # Pillow's
        image = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and _colours_first(array.shape, first):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in _COLOURS or array.dtype.kind not in "fiub":
        shape = getattr(image, "shape", None)
        what = type(image).__name__ if shape is None else f"{type(image).__name__} of shape {tuple(shape)}"
        raise ConfigurationError(
            f"log_image: {what} is no picture: give (C, H, W) tensors, (H, W, C) arrays with 1, 3 or 4 colours, "
            f"(H, W), a batch or a list of them, or Pillow images."
        )
    if array.dtype.kind == "f":
        array = np.nan_to_num(array).clip(0.0, 1.0) * 255.0 + 0.5
    elif array.dtype.kind == "b":
        array = array * 255
    array = array.clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(array.repeat(3, axis=2) if array.shape[2] == 1 else array)


def _colours_first(shape: tuple[int, ...], expected: bool) -> bool:
    first, last = shape[0] in _COLOURS, shape[-1] in _COLOURS
    return expected if first and last else first


def as_captions(caption: Any, images: int) -> list[str | None]:
    """One caption for each picture.

    Raises:
        ConfigurationError: There are more or fewer of them than pictures.
    """
    captions = [caption] * images if caption is None or isinstance(caption, str) else list(caption)
    if len(captions) != images:
        raise ConfigurationError(f"log_image: {len(captions)} captions for {images} images; give one for each.")
    return captions


def draw(figure: Any) -> Any:
    """A matplotlib figure as an array (H, W, 4) of uint8; an array or tensor as it is.

    Raises:
        ConfigurationError: It is neither.
    """
    if isinstance(figure, Tensor) or hasattr(figure, "__array_interface__"):
        return figure
    if not hasattr(figure, "savefig"):
        raise ConfigurationError(f"log_figure: got a {type(figure).__name__}; give a matplotlib figure.")
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    own = figure.canvas
    try:
        canvas = FigureCanvasAgg(figure)  # whatever backend the figure was made for; needs no display
        canvas.draw()
        return np.array(canvas.buffer_rgba(), dtype=np.uint8)
    finally:
        figure.set_canvas(own)


def as_values(values: Any) -> NDArray[Any]:
    """Numbers of any shape as a flat array.

    Raises:
        ConfigurationError: There are none.
    """
    import numpy as np

    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.to(torch.float32) if values.dtype in (torch.bfloat16, torch.float16) else values
        values = values.numpy()
    array = np.asarray(values).reshape(-1)
    if not array.size or array.dtype.kind not in "fiub":
        raise ConfigurationError(f"log_histogram: got {values!r}; give numbers: a tensor, an array or a list.")
    return array
