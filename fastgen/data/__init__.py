from fastgen.data.datasets import ImageDataset, list_datasets, load_dataset
from fastgen.data.images import picture_format, save_grid
from fastgen.data.sampler import BatchSampler

__all__ = ["BatchSampler", "ImageDataset", "list_datasets", "load_dataset", "picture_format", "save_grid"]
