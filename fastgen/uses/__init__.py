"""What a trained model is used for: functions over a model and images, the same whatever trained it."""

from fastgen.uses.draw import Drawing, conditions, interpolate
from fastgen.uses.pictures import transform_pictures
from fastgen.uses.restore import denoise, inpaint, reconstruct, upscale
from fastgen.uses.translate import translate

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
