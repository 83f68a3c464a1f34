from fastgen.data.datasets import Batch, DomainPair, ImageDataset
from fastgen.data.decode import is_grey, read_image
from fastgen.data.folders import image_paths
from fastgen.data.load import list_datasets, load_dataset
from fastgen.data.sampler import BatchSampler
from fastgen.images import picture_format, save_animation, save_grid

__all__ = [
    "Batch",
    "BatchSampler",
    "DomainPair",
    "ImageDataset",
    "image_paths",
    "is_grey",
    "list_datasets",
    "load_dataset",
    "picture_format",
    "read_image",
    "save_animation",
    "save_grid",
]
