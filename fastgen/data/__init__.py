from fastgen.data.datasets import ImageDataset, list_datasets, load_dataset
from fastgen.data.images import save_grid
from fastgen.data.sampler import BatchSampler
from fastgen.images import picture_format

__all__ = ["BatchSampler", "ImageDataset", "list_datasets", "load_dataset", "picture_format", "save_grid"]
