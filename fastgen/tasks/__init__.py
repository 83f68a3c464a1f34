"""Uses of a trained model, as functions of a model and images.

The model may be anybody's: `fastgen.models.capabilities` says which methods a task needs.
"""

from fastgen.tasks.draw import Drawing, conditions, interpolate
from fastgen.tasks.pictures import transform_pictures
from fastgen.tasks.restore import denoise, inpaint, reconstruct, upscale
from fastgen.tasks.translate import translate

__all__ = [
    "Drawing",
    "conditions",
    "denoise",
    "inpaint",
    "interpolate",
    "reconstruct",
    "transform_pictures",
    "translate",
    "upscale",
]
