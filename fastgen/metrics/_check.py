from torch import Tensor

from fastgen.errors import DataError


def check_finite(what: str, values: Tensor) -> None:
    """Raises DataError, which names the image, if a value of `values` (N, ...), one row an image, is NaN or infinite."""
    bad = values.isfinite().flatten(1).all(1).logical_not().nonzero()
    if len(bad):
        raise DataError(f"{what} must be finite, and of {len(values)} images number {bad[0].item()} (from 0) is not")
