"""The architectures: one a file, each with a frozen config, made by name with `create_model`."""

from fastgen.models.dcgan import DCGAN, DCGANConfig, DCGANDiscriminator, DCGANGenerator
from fastgen.models.registry import create_model, list_models, register_model

__all__ = [
    "DCGAN",
    "DCGANConfig",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "create_model",
    "list_models",
    "register_model",
]
