from fastgen.training.recipes.base import Recipe
from fastgen.training.recipes.dcgan import DCGANRecipe

RECIPES: dict[str, type[Recipe]] = {"dcgan": DCGANRecipe}

__all__ = ["RECIPES", "DCGANRecipe", "Recipe"]
