from torch import Tensor

from fastgen.errors import DataError, UsageError


def check_images(name: str, images: object) -> None:
    """Raises UsageError unless the images are a floating-point tensor: integers from 0 to 255 are not in [-1, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        actual = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UsageError(f"{name} must be a tensor of floating-point numbers in [-1, 1], not {actual}")


def check_finite(what: str, values: Tensor) -> None:
    """Raises DataError, which names the image, if any of the `values` (N, ...) of N images is NaN or infinite."""
    bad = values.isfinite().flatten(1).all(1).logical_not().nonzero()
    if len(bad):
        raise DataError(f"{what} must be finite, but image {bad[0].item()} of {len(values)} (counted from 0) is not")
