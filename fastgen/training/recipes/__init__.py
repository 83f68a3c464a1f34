from fastgen.training.recipes.base import Recipe
from fastgen.training.recipes.cgan import CGANRecipe
from fastgen.training.recipes.cyclegan import CycleGANRecipe
from fastgen.training.recipes.gan import DCGANRecipe, GANRecipe, MLPGANRecipe
from fastgen.training.recipes.text2image import Text2ImageRecipe
from fastgen.training.recipes.vae import VAERecipe

RECIPES: dict[str, type[Recipe]] = {
    "gan": MLPGANRecipe,
    "dcgan": DCGANRecipe,
    "wgan": DCGANRecipe,
    "wgan_gp": DCGANRecipe,
    "lsgan": DCGANRecipe,
    "cgan": CGANRecipe,
    "vae": VAERecipe,
    "cyclegan": CycleGANRecipe,
    "text2image": Text2ImageRecipe,
}

__all__ = [
    "RECIPES",
    "CGANRecipe",
    "CycleGANRecipe",
    "DCGANRecipe",
    "GANRecipe",
    "MLPGANRecipe",
    "Recipe",
    "Text2ImageRecipe",
    "VAERecipe",
]
