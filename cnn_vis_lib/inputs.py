"""The input pictures of a run."""

import dataclasses

import numpy as np

from .checkpoints import unusable
from .errors import BadRequest, one_line, refusal
from .files import existing_file
from .reading import read_mask, read_masked, read_picture


@dataclasses.dataclass
class Inputs:
    """A run's input pictures, None for those that it does not have: the start picture, uint8
    (H, W, 3); its mask, uint8 (H, W); the guide, uint8 (H, W, 3)."""

    picture: np.ndarray | None = None
    mask: np.ndarray | None = None
    guide: np.ndarray | None = None

    def arrays(self):
        """Those that are not None, {name: array}."""
        return {name: array for name, array in vars(self).items() if array is not None}


def read_inputs(settings, image=None):
    """(Inputs, remarks on how it was read) for the settings. If the array `image` is passed, it is
    the start picture. Raises BadRequest."""
    if image is not None or settings.initial_image is None:
        picture, (mask, remarks) = image, read_mask(settings.mask, image)
    else:
        path = existing_file("image", settings.initial_image)
        picture, mask, remarks = read_masked(path, settings.background, settings.mask)
    guide = None
    if settings.guide is not None:
        path = existing_file("guide", settings.guide)
        guide, more = read_picture(path, settings.background, "guide")
        remarks = [*remarks, *more]
        if max(guide.shape[:2]) > 16 * min(guide.shape[:2]):
            problem = "one side is more than 16 times as long as the other"
            raise refusal("guide", path, problem, "crop the picture")
    return Inputs(picture, mask, guide), remarks


def kept_inputs(settings, checkpoint, path):
    """The Inputs of a resumed run, removed from its Checkpoint `path`. Raises BadRequest."""
    asked = {"picture": settings.initial_image, "mask": settings.mask, "guide": settings.guide}
    inputs = Inputs(**{name: checkpoint.arrays.pop(name, None) for name in asked})
    for name, option in asked.items():
        array = getattr(inputs, name)
        if (array is None) != (option is None) or (array is not None and not array.size):
            raise unusable(path, f"its {name} is missing, empty or unexpected")
    mask, picture = inputs.mask, inputs.picture
    fits = mask is None or picture is not None and mask.shape == picture.shape[:2] and mask.any()
    if not fits:
        raise unusable(path, "its mask is black everywhere or does not fit its picture")
    return inputs


def checked_array(image):
    """An RGB picture as a NumPy array, uint8 (H, W, 3). Raises BadRequest if it is none."""
    try:
        image = np.asarray(image)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"image: {one_line(error)}", "it must be uint8 (H, W, 3)") from None
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        kind = f"the array is {image.dtype} {image.shape}"
        raise BadRequest(f"image: {kind}", "it must be uint8 (H, W, 3)")
    return image
