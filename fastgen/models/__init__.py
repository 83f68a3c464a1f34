"""The architectures: one per file, each with a frozen config, created by name with `create_model`."""

from fastgen.models._base import evaluating
from fastgen.models._capabilities import Capabilities, Condition, capabilities
from fastgen.models.cgan import CGAN, CGANConfig
from fastgen.models.checkpoints import load_checkpoint
from fastgen.models.cyclegan import CycleGAN, CycleGANConfig
from fastgen.models.dcgan import DCGAN, DCGANConfig, DCGANDiscriminator, DCGANGenerator
from fastgen.models.gan import GAN, GANConfig
from fastgen.models.patchgan import PatchGAN, PixelDiscriminator
from fastgen.models.registry import create_model, list_models, register_model
from fastgen.models.resnet_generator import ResnetGenerator
from fastgen.models.text2image import Text2Image, Text2ImageConfig
from fastgen.models.text_encoder import make_vocabulary
from fastgen.models.unet import UnetGenerator
from fastgen.models.vae import VAE, VAEConfig
from fastgen.models.vae_mlp import MLPVAE, MLPVAEConfig

__all__ = [
    "CGAN",
    "DCGAN",
    "GAN",
    "MLPVAE",
    "VAE",
    "CGANConfig",
    "Capabilities",
    "Condition",
    "CycleGAN",
    "CycleGANConfig",
    "DCGANConfig",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "GANConfig",
    "MLPVAEConfig",
    "PatchGAN",
    "PixelDiscriminator",
    "ResnetGenerator",
    "Text2Image",
    "Text2ImageConfig",
    "UnetGenerator",
    "VAEConfig",
    "capabilities",
    "create_model",
    "evaluating",
    "list_models",
    "load_checkpoint",
    "make_vocabulary",
    "register_model",
]
