"""What a run is made from. No torch here: the command line's help shows these classes."""

import dataclasses
import reprlib
import sys
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastgen.errors import UsageError, unknown_name

AUGMENTATIONS = ("color", "translation", "cutout")


@dataclass(frozen=True)
class TrainConfig:
    """What every system's training has in common."""

    system: ClassVar[str]
    resumable: ClassVar[frozenset[str]] = frozenset({"steps", "device", "log_every", "save_every"})
    """What `--resume` may change; all else is part of what the run is."""
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "steps": (1, 10**9), "batch_size": (1, 2**16), "log_every": (1, 10**9), "save_every": (1, 10**9),
        "seed": (0, 2**63 - 1), "lr_decay_from": (0, 1), "clip_grad": (0, 1e30), "image_size": (1, 2**14),
    }  # fmt: skip
    """Least and greatest value of a setting; a class's own are added to those of the classes above it."""

    data: str = "digits"
    """Data set to learn from: a name, or a path."""
    strict: bool = False
    """An image that is damaged or too small ends the run; otherwise it is named in the log and left out."""
    steps: int = 5000
    """Training steps in all."""
    image_size: int = 32
    """Height and width of the images."""
    batch_size: int = 32
    """Images a step."""
    seed: int = 0
    """Seed of weights, noise and the order of the data. The same seed gives the same bits on the same machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of what the networks compute in; bf16 by autocast, with weights and losses in fp32."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or gradient descent with momentum beta1."""
    lr: float = 2e-3
    """Learning rate."""
    lr_decay_from: float = 0.4
    """Share of the steps after which the learning rate falls linearly to 0; 1 keeps it."""
    beta1: float = 0.0
    """Adam's first decay rate, or the momentum of sgd."""
    beta2: float = 0.99
    """Adam's second decay rate."""
    clip_grad: float = 0.0
    """Greatest norm of an optimizer's gradient, which is scaled down to it; 0 does not clip."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints, each with a grid of samples."""
    ema_decay: float = 0.998
    """Decay a step of the averaged weights, which make the samples."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, hints[field.name], getattr(self, field.name))
        for kind in type(self).__mro__:
            for name, (least, most) in vars(kind).get("ranges", {}).items():
                self._check(name, least <= getattr(self, name) <= most, f"between {least} and {most}")
        for name in ("ema_decay", "beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._check("lr", 0 < self.lr < float("inf"), "positive")
        self._check("data", bool(self.data.strip()), "a name or a path")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {wanted}, not {reprlib.repr(getattr(self, name))}")

    def to_json(self) -> dict[str, Any]:
        return {"system": self.system, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class GANTraining(TrainConfig):
    """What the training of GANs with one generator and one discriminator has in common."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "nz": (1, 2**13), "d_steps": (1, 1000), "r1_gamma": (0, 1e30), "r1_every": (1, 10**9),
        "gradient_penalty": (0, 1e30), "clip_weights": (0, 1e30),
    }  # fmt: skip

    nz: int = 64
    """Length of the noise vector."""
    loss: Literal["minimax", "non_saturating", "hinge", "least_squares", "wasserstein"] = "non_saturating"
    """Adversarial loss of both networks."""
    d_steps: int = 1
    """Steps of the discriminator, each with images of its own, before one of the generator."""
    r1_gamma: float = 1.0
    """Weight of the R1 gradient penalty on real images; 0 is none."""
    r1_every: int = 8
    """Steps between R1 penalties, each weighted by this number (lazy regularisation)."""
    gradient_penalty: float = 0.0
    """Weight of WGAN-GP's gradient penalty; 0 is none."""
    clip_weights: float = 0.0
    """Greatest size of a weight of the discriminator, as in WGAN; 0 does not clip."""
    augment: str = ""
    """What the discriminator sees changed, real and generated alike, for small data (DiffAugment): color, translation,
    cutout, with commas between."""

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
    """Height and width of the images."""
    nz: int = 100
    """Length of the noise vector."""
    width: int = 256
    """Units of each hidden layer."""
    generator_norm: Literal["batch", "none"] = "none"
    """Norm after the generator's hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator_norm == "batch":
            self._check("batch_size", self.batch_size > 1, "at least 2 for generator_norm batch")


@dataclass(frozen=True)
class DCGANTraining(GANTraining):
    """Train a DCGAN: transposed convolutions against strided ones (Radford et al. 2015).

    Non-saturating loss, lazy R1 penalty, averaged generator weights.
    """

    system: ClassVar[str] = "dcgan"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"ngf": (1, 2**13), "ndf": (1, 2**13)}

    image_size: Literal[32, 64, 128] = 32
    """Height and width of the images."""
    ngf: int = 32
    """Channels of the generator's last hidden layer."""
    ndf: int = 32
    """Channels of the discriminator's first layer."""


@dataclass(frozen=True)
class WGANTraining(DCGANTraining):
    """Train a DCGAN with the Wasserstein loss and clipped weights (Arjovsky et al. 2017)."""

    system: ClassVar[str] = "wgan"

    loss: Literal["wasserstein"] = "wasserstein"
    """Adversarial loss of both networks."""
    d_steps: int = 5
    """Steps of the discriminator, each with images of its own, before one of the generator."""
    lr: float = 5e-4
    """Learning rate."""
    r1_gamma: float = 0.0
    """Weight of the R1 gradient penalty on real images; 0 is none."""
    clip_weights: float = 0.05
    """Greatest size of a weight of the discriminator, as in WGAN; 0 does not clip."""


@dataclass(frozen=True)
class WGANGPTraining(DCGANTraining):
    """Train a DCGAN with the Wasserstein loss and a gradient penalty (Gulrajani et al. 2017)."""

    system: ClassVar[str] = "wgan_gp"

    loss: Literal["wasserstein"] = "wasserstein"
    """Adversarial loss of both networks."""
    d_steps: int = 2
    """Steps of the discriminator, each with images of its own, before one of the generator."""
    lr: float = 1e-3
    """Learning rate."""
    r1_gamma: float = 0.0
    """Weight of the R1 gradient penalty on real images; 0 is none."""
    gradient_penalty: float = 10.0
    """Weight of WGAN-GP's gradient penalty; 0 is none."""


@dataclass(frozen=True)
class LSGANTraining(DCGANTraining):
    """Train a DCGAN with the least-squares loss (Mao et al. 2017)."""

    system: ClassVar[str] = "lsgan"

    loss: Literal["least_squares"] = "least_squares"
    """Adversarial loss of both networks."""


@dataclass(frozen=True)
class CGANTraining(DCGANTraining):
    """Train a conditional GAN, whose images are of the class asked for (Mirza and Osindero 2014)."""

    system: ClassVar[str] = "cgan"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"embedding": (1, 2**13)}

    steps: int = 3000
    """Training steps in all."""
    embedding: int = 32
    """Length of a class's vector beside the noise."""
    generator_norm: Literal["batch", "conditional"] = "batch"
    """Norm in the generator; conditional gives each class gains and biases of its own."""
    condition: Literal["projection", "concatenation"] = "projection"
    """How the discriminator sees the class: by an inner product with its features, or as one more channel of the
    image."""


@dataclass(frozen=True)
class Text2ImageTraining(DCGANTraining):
    """Train a text-to-image GAN with a text encoder and a discriminator that sees the text (Reed et al. 2016)."""

    system: ClassVar[str] = "text2image"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "text_width": (4, 2**13), "text_layers": (1, 100), "condition": (1, 2**13)
    }  # fmt: skip

    steps: int = 3000
    """Training steps in all."""
    text_encoder: str = "transformer"
    """transformer, trained with the rest, or the name or folder of a Hugging Face text encoder, used as it is."""
    text_width: int = 64
    """Width of the text encoder that is trained, a multiple of 4."""
    text_layers: int = 2
    """Its layers."""
    condition: int = 64
    """Length of the vector that a caption becomes."""


@dataclass(frozen=True)
class VAETraining(TrainConfig):
    """Train a variational autoencoder (Kingma and Welling 2014; with beta, Higgins et al. 2017).

    It reconstructs, denoises, fills in and enlarges images too.
    """

    system: ClassVar[str] = "vae"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "nz": (1, 2**13), "width": (1, 2**13), "beta": (0, 1e30), "warm_up": (0, 1),
    }  # fmt: skip

    steps: int = 2500
    """Training steps in all."""
    lr: float = 1e-3
    """Learning rate."""
    beta1: float = 0.9
    """Adam's first decay rate, or the momentum of sgd."""
    beta2: float = 0.999
    """Adam's second decay rate."""
    architecture: Literal["conv", "mlp"] = "conv"
    """Convolutions, or two hidden layers of units."""
    nz: int = 32
    """Length of the latent vector."""
    width: int = 16
    """Channels of the first convolution, doubled down to 4x4 pixels; for mlp a 25th of the hidden units."""
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    """Distribution of a pixel given the latent vector."""
    beta: float = 1.0
    """Weight of the KL term."""
    warm_up: float = 0.1
    """Share of the steps over which that weight grows from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture == "conv" and self.image_size >> self.halvings == 1:  # and batch norm takes two values
            self._check("batch_size", self.batch_size > 1, f"at least 2 for image_size {self.image_size}")

    @property
    def halvings(self) -> int:
        """How often the convolutions halve the image, to about 4x4 pixels."""
        return max(1, (self.image_size // 4).bit_length() - 1)


@dataclass(frozen=True)
class CycleGANTraining(TrainConfig):
    """Train a CycleGAN between two sets of images without pairs (Zhu et al. 2017)."""

    system: ClassVar[str] = "cyclegan"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "ngf": (1, 2**13), "ndf": (1, 2**13), "blocks": (1, 1000), "unet_depth": (2, 16), "discriminator_layers": (1,
        10), "cycle": (0, 1e30), "identity": (0, 1e30), "pool_size": (0, 10**5),
    }  # fmt: skip

    data: str = "colour-to-grey"
    """Data set to learn from: a name, or a folder with trainA and trainB."""
    steps: int = 3000
    """Training steps in all."""
    image_size: int = 64
    """Height and width of the images."""
    batch_size: int = 4
    """Images of each domain a step."""
    lr: float = 5e-4
    """Learning rate."""
    beta1: float = 0.5
    """Adam's first decay rate, or the momentum of sgd."""
    beta2: float = 0.999
    """Adam's second decay rate."""
    save_every: int = 500
    """Steps between checkpoints, each with a grid of samples."""
    ema_decay: float = 0.99
    """Decay a step of the averaged weights, which make the samples."""
    generator: Literal["unet", "resnet"] = "unet"
    """Architecture of both generators: that of pix2pix, quicker to learn where the images stay alike, or that of
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
    """Hidden layers of a PatchGAN after its first: 3 judges patches of 70x70 pixels, 2 of 34x34."""
    norm: Literal["batch", "instance"] = "batch"
    """Norm of all networks. instance, the paper's, takes an image's mean and contrast away, which small patches
    need."""
    dropout: bool = False
    """Dropout of one half in the generators."""
    loss: Literal["least_squares", "non_saturating", "hinge", "wasserstein", "minimax"] = "least_squares"
    """Adversarial loss."""
    cycle: float = 10.0
    """Weight of the cycle loss."""
    identity: float = 0.5
    """Weight of the identity loss, times that of the cycle loss; needs domains of as many channels."""
    pool_size: int = 50
    """Generated images of each domain that are kept for the discriminator to see again; 0 shows it the newest."""


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
    known = [field.name for field in dataclasses.fields(CONFIGS[system])]
    for name in options:
        if name not in known:
            raise unknown_name(f"option of {system}", name, known)
    return CONFIGS[system](**options)


def _check_type(name: str, wanted: Any, value: Any) -> None:
    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        if value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}, not {reprlib.repr(value)}")
    elif wanted is float:
        number = isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)
        if not number:
            raise UsageError(f"{name} must be a number, not {reprlib.repr(value)}")
    elif type(value) is not wanted:
        raise UsageError(f"{name} must be of type {wanted.__name__}, not {reprlib.repr(value)}")
