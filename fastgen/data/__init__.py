from fastgen.data.datasets import Batch, DomainPair, ImageDataset
from fastgen.data.images import save_grid
from fastgen.data.load import list_datasets, load_dataset
from fastgen.data.sampler import BatchSampler
from fastgen.images import picture_format

__all__ = [
    "Batch",
    "BatchSampler",
    "DomainPair",
    "ImageDataset",
    "list_datasets",
    "load_dataset",
    "picture_format",
    "save_grid",
]
