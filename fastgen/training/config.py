"""The settings of a run. No torch here: the command line's help shows these classes.

A class that only changes the default of a setting does not repeat its description, which tyro finds in the class above.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from fastgen.errors import unknown_name
from fastgen.options import check_options, require, with_current_names

AUGMENTATIONS = ("color", "translation", "cutout")


@dataclass(frozen=True)
class TrainConfig:
    """The settings that all systems share."""

    system: ClassVar[str]
    resumable: ClassVar[frozenset[str]] = frozenset({"steps", "device", "log_every", "save_every"})
    """What `--resume` may change; everything else defines the run."""
    renamed: ClassVar[dict[str, str]] = {}
    """Old name of a setting -> its name, for runs that were saved with it."""
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "steps": (1, 10**9), "batch_size": (1, 2**16), "log_every": (1, 10**9), "save_every": (1, 10**9),
        "seed": (0, 2**63 - 1), "lr_decay_from": (0, 1), "clip_grad": (0, 1e30), "image_size": (1, 2**14),
    }  # fmt: skip
    """Least and greatest value of a setting; see `fastgen.options.check_options`."""

    data: str = "digits"
    """Data set to learn from: a name, or a path."""
    strict: bool = False
    """Stop at an image that is damaged or too small; otherwise it is named in the log and left out."""
    steps: int = 5000
    """Total number of training steps."""
    image_size: int = 32
    """Height and width of the images."""
    batch_size: int = 32
    """Images per step."""
    seed: int = 0
    """Seed of weights, noise and the order of the data. The same seed gives the same bits on the same machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto uses a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks; bf16 is by autocast, with weights and losses in fp32."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with momentum beta1."""
    lr: float = 2e-3
    """Learning rate."""
    lr_decay_from: float = 0.4
    """Fraction of the steps after which the learning rate decays linearly to 0; 1 keeps it constant."""
    beta1: float = 0.0
    """Adam's first decay rate, or the momentum of SGD."""
    beta2: float = 0.99
    """Adam's second decay rate."""
    clip_grad: float = 0.0
    """Maximum norm of an optimizer's gradient, which is scaled down to it; 0 does not clip."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints, each with a grid of samples."""
    ema_decay: float = 0.998
    """Decay per step of the averaged weights, which samples are drawn with."""

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("ema_decay", "beta1", "beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        require(self, "lr", 0 < self.lr < float("inf"), "positive")
        require(self, "data", bool(self.data.strip()), "a name or a path")

    def to_json(self) -> dict[str, Any]:
        return {"system": self.system, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class GANTraining(TrainConfig):
    """The settings that GANs with one generator and one discriminator share."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "nz": (1, 2**13), "d_steps": (1, 1000), "r1_gamma": (0, 1e30), "r1_every": (1, 10**9),
        "gradient_penalty": (0, 1e30), "clip_weights": (0, 1e30),
    }  # fmt: skip

    nz: int = 64
    """Length of the noise vector."""
    loss: Literal["minimax", "non_saturating", "hinge", "least_squares", "wasserstein"] = "non_saturating"
    """Adversarial loss of both networks."""
    d_steps: int = 1
    """Discriminator steps, each with its own images, per generator step."""
    r1_gamma: float = 1.0
    """Weight of the R1 gradient penalty on real images; 0 disables it."""
    r1_every: int = 8
    """Steps between R1 penalties, each weighted by this number (lazy regularisation)."""
    gradient_penalty: float = 0.0
    """Weight of WGAN-GP's gradient penalty; 0 disables it."""
    clip_weights: float = 0.0
    """Bound on the absolute value of the discriminator's weights, as in WGAN; 0 does not clip."""
    augment: str = ""
    """Augmentations of the discriminator's images (DiffAugment), separated by commas: color, translation, cutout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.augmentations:
            if name not in AUGMENTATIONS:
                raise unknown_name("augmentation", name, AUGMENTATIONS)

    @property
    def augmentations(self) -> list[str]:
        return [name for name in self.augment.replace(" ", "").split(",") if name]


@dataclass(frozen=True)
class MLPGANTraining(GANTraining):
    """Train a GAN of two multilayer perceptrons (Goodfellow et al. 2014)."""

    system: ClassVar[str] = "gan"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"width": (1, 2**14)}

    image_size: int = 28
    nz: int = 100
    width: int = 256
    """Units of each hidden layer."""
    generator_norm: Literal["batch", "none"] = "none"
    """Norm after the generator's hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator_norm == "batch":
            require(self, "batch_size", self.batch_size > 1, "at least 2 for generator_norm batch")


@dataclass(frozen=True)
class DCGANTraining(GANTraining):
    """Train a DCGAN: transposed convolutions against strided ones (Radford et al. 2015).

    Non-saturating loss, lazy R1 penalty, averaged generator weights.
    """

    system: ClassVar[str] = "dcgan"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"ngf": (1, 2**13), "ndf": (1, 2**13)}

    image_size: Literal[32, 64, 128] = 32
    ngf: int = 32
    """Channels of the generator's last hidden layer."""
    ndf: int = 32
    """Channels of the discriminator's first layer."""


# tyro.conf.Suppress hides an option that has a single choice; a saved run has it and is still read.


@dataclass(frozen=True)
class WGANTraining(DCGANTraining):
    """Train a DCGAN with the Wasserstein loss and clipped weights (Arjovsky et al. 2017)."""

    system: ClassVar[str] = "wgan"

    loss: Annotated[Literal["wasserstein"], tyro.conf.Suppress] = "wasserstein"
    d_steps: int = 5
    lr: float = 5e-4
    r1_gamma: float = 0.0
    clip_weights: float = 0.05


@dataclass(frozen=True)
class WGANGPTraining(DCGANTraining):
    """Train a DCGAN with the Wasserstein loss and a gradient penalty (Gulrajani et al. 2017)."""

    system: ClassVar[str] = "wgan_gp"

    loss: Annotated[Literal["wasserstein"], tyro.conf.Suppress] = "wasserstein"
    d_steps: int = 2
    lr: float = 1e-3
    r1_gamma: float = 0.0
    gradient_penalty: float = 10.0


@dataclass(frozen=True)
class LSGANTraining(DCGANTraining):
    """Train a DCGAN with the least-squares loss (Mao et al. 2017)."""

    system: ClassVar[str] = "lsgan"

    loss: Annotated[Literal["least_squares"], tyro.conf.Suppress] = "least_squares"


@dataclass(frozen=True)
class CGANTraining(DCGANTraining):
    """Train a conditional GAN, which draws images of a given class (Mirza and Osindero 2014)."""

    system: ClassVar[str] = "cgan"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"embedding": (1, 2**13)}
    renamed: ClassVar[dict[str, str]] = {"condition": "discriminator_conditioning"}

    steps: int = 3000
    embedding: int = 32
    """Length of a class's embedding, which is appended to the noise."""
    generator_norm: Literal["batch", "conditional"] = "batch"
    """Norm in the generator; conditional gives each class gains and biases of its own."""
    discriminator_conditioning: Literal["projection", "concatenation"] = "projection"
    """How the discriminator sees the class: by an inner product with its features, or as an additional channel of the
    image."""


@dataclass(frozen=True)
class Text2ImageTraining(DCGANTraining):
    """Train a text-to-image GAN with a text encoder and a discriminator that sees the text (Reed et al. 2016)."""

    system: ClassVar[str] = "text2image"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "text_width": (4, 2**13), "text_layers": (1, 100), "caption_width": (1, 2**13)
    }  # fmt: skip
    renamed: ClassVar[dict[str, str]] = {"condition": "caption_width"}

    steps: int = 3000
    text_encoder: str = "transformer"
    """transformer, trained with the model, or the name or folder of a Hugging Face text encoder, used as it is."""
    text_width: int = 64
    """Width of the text encoder that is trained, a multiple of 4."""
    text_layers: int = 2
    """Layers of the text encoder that is trained."""
    caption_width: int = 64
    """Length of the vector that a caption is encoded as."""


@dataclass(frozen=True)
class VAETraining(TrainConfig):
    """Train a variational autoencoder (Kingma and Welling 2014; with beta, Higgins et al. 2017).

    It can also reconstruct, denoise, inpaint and upscale images.
    """

    system: ClassVar[str] = "vae"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "nz": (1, 2**13), "width": (1, 2**13), "beta": (0, 1e30), "warm_up": (0, 1),
    }  # fmt: skip

    steps: int = 2500
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    architecture: Literal["conv", "mlp"] = "conv"
    """Convolutional, or fully connected with one hidden layer in encoder and decoder."""
    nz: int = 32
    """Length of the latent vector."""
    width: int = 16
    """Channels of the first convolution, doubled per halving down to 4x4 pixels; mlp has 25 times as many units."""
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    """Distribution of a pixel given the latent vector."""
    beta: float = 1.0
    """Weight of the KL term."""
    warm_up: float = 0.1
    """Fraction of the steps over which the KL term's weight grows from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture == "conv" and self.image_size >> self.halvings == 1:
            # batch norm needs two values per channel
            require(self, "batch_size", self.batch_size > 1, f"at least 2 for image_size {self.image_size}")

    @property
    def halvings(self) -> int:
        """How often the convolutions halve the image, to about 4x4 pixels."""
        return max(1, (self.image_size // 4).bit_length() - 1)


@dataclass(frozen=True)
class CycleGANTraining(TrainConfig):
    """Train a CycleGAN between two unpaired sets of images (Zhu et al. 2017)."""

    system: ClassVar[str] = "cyclegan"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "ngf": (1, 2**13), "ndf": (1, 2**13), "blocks": (1, 1000), "unet_depth": (2, 16), "discriminator_layers": (1,
        10), "cycle": (0, 1e30), "identity": (0, 1e30), "pool_size": (0, 10**5),
    }  # fmt: skip

    data: str = "colour-to-grey"
    """Data set to learn from: a name, or a folder with trainA and trainB."""
    steps: int = 3000
    image_size: int = 64
    batch_size: int = 4
    """Images of each domain per step."""
    lr: float = 5e-4
    beta1: float = 0.5
    beta2: float = 0.999
    ema_decay: float = 0.99
    generator: Literal["unet", "resnet"] = "unet"
    """Architecture of both generators: that of pix2pix, which learns faster if the images change little, or that of
    CycleGAN."""
    ngf: int = 16
    """Channels of a generator's first layer."""
    ndf: int = 16
    """Channels of a discriminator's first layer."""
    blocks: int = 6
    """Residual blocks of a ResNet."""
    unet_depth: int = 4
    """Layers of a U-Net that halve the image."""
    discriminator_layers: int = 2
    """Hidden layers of a PatchGAN after its first: with 3 it judges patches of 70x70 pixels, with 2 of 34x34."""
    norm: Literal["batch", "instance"] = "batch"
    """Norm of all networks. The paper uses instance, which removes an image's mean and contrast; small patches need
    them."""
    dropout: bool = False
    """Dropout with probability 0.5 in the generators."""
    loss: Literal["least_squares", "non_saturating", "hinge", "wasserstein", "minimax"] = "least_squares"
    """Adversarial loss of all networks."""
    cycle: float = 10.0
    """Weight of the cycle loss."""
    identity: float = 0.5
    """Weight of the identity loss relative to the cycle loss; needs domains with equal numbers of channels."""
    pool_size: int = 50
    """Generated images of each domain that are kept to show the discriminator again; 0 shows it only new ones."""


CONFIGS: dict[str, type[TrainConfig]] = {
    config.system: config
    for config in (
        MLPGANTraining, DCGANTraining, CGANTraining, WGANTraining, WGANGPTraining, LSGANTraining, VAETraining,
        CycleGANTraining, Text2ImageTraining,
    )
}  # fmt: skip


def config_from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `TrainConfig.to_json`.

    Raises:
        UsageError: an unknown system or option, or a value of the wrong type or range.
    """
    options = dict(values)
    system = str(options.pop("system", None))
    if system not in CONFIGS:
        raise unknown_name("system", system, CONFIGS)
    options = with_current_names(CONFIGS[system], options)
    known = [field.name for field in dataclasses.fields(CONFIGS[system])]
    for name in options:
        if name not in known:
            raise unknown_name(f"option of {system}", name, known)
    return CONFIGS[system](**options)
