"""A tiny instance of every model."""

import contextlib

import torch

from fastgen.models import create_model

WORDS = ("a", "handwritten", "one", "two")
SMALL = {"image_size": 32, "channels": 1, "nz": 4, "ngf": 2, "ndf": 2}
PAIR = {"image_size": 16, "ngf": 2, "ndf": 2, "blocks": 1, "discriminator_layers": 2}
# name -> options, number of fused runs, and the layers with weights that no op computes: those with no norm or
# activation
TINY = {
    "gan": ("gan", {"image_size": 8, "nz": 4, "width": 8}, 0, set()),
    "gan with batch norm": ("gan", {"image_size": 8, "nz": 4, "width": 8, "generator_norm": "batch"}, 2, set()),
    "dcgan": ("dcgan", SMALL, 7, {"discriminator.main.8"}),
    "cgan": ("cgan", SMALL, 7, {"discriminator.head"}),
    "cgan, conditional norm": (
        "cgan",
        {**SMALL, "generator_norm": "conditional", "discriminator_conditioning": "concatenation",
         "discriminator_norm": "none"},
        7, {"discriminator.head"},
    ),
    "vae": ("vae", {"image_size": 8, "channels": 1, "nz": 4, "widths": [2, 3]}, 5, set()),
    "vae, bernoulli": ("vae", {"image_size": 8, "channels": 1, "nz": 4, "widths": [2, 3], "likelihood": "bernoulli"}, 5,
    set()), "vae_mlp": ("vae_mlp", {"image_size": 8, "nz": 4, "width": 8}, 0, set()),
    "text2image": ("text2image", {**SMALL, "vocabulary": WORDS, "text_width": 8, "caption_width": 4}, 8,
    {"discriminator.head"}), "cyclegan": (
        "cyclegan", {**PAIR, "channels_b": 1}, 8 * 2 + 3 * 2, {"discriminator_a.model.8", "discriminator_b.model.8"},
    ),
    "cyclegan, unet": (
        "cyclegan", {**PAIR, "generator": "unet", "unet_depth": 3, "norm": "batch", "dropout": True}, 6 * 2 + 3 * 2,
        {"discriminator_a.model.8", "discriminator_b.model.8"},
    ),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    model, options, *_ = TINY[name]
    return create_model(model, **options)


@contextlib.contextmanager
def defaults(dtype=torch.float64, device="meta"):
    """A context with process-wide defaults."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
