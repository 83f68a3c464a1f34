"""What a run is made from. No torch here: the command line's help shows these classes."""

import dataclasses
import reprlib
import sys
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastgen.errors import UsageError, unknown_name


@dataclass(frozen=True)
class TrainConfig:
    """What every system's training has in common."""

    system: ClassVar[str]
    resumable: ClassVar[frozenset[str]] = frozenset({"steps", "device", "log_every", "save_every"})
    """What `--resume` may change; all else is part of what the run is."""

    data: str = "digits"
    """Data set to learn from."""
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
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints, each with a grid of samples."""
    ema_decay: float = 0.998
    """Decay a step of the averaged weights, which make the samples."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, typing.get_type_hints(type(self))[field.name], getattr(self, field.name))
        for name, most in (("steps", 10**9), ("batch_size", 2**16), ("log_every", 10**9), ("save_every", 10**9)):
            self._check_between(name, 1, most)
        self._check("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and below 1")
        self._check("seed", 0 <= self.seed < 2**63, "between 0 and 2^63")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {wanted}, not {reprlib.repr(getattr(self, name))}")

    def _check_between(self, name: str, least: int, most: int) -> None:
        self._check(name, least <= getattr(self, name) <= most, f"between {least} and {most}")

    def to_json(self) -> dict[str, Any]:
        return {"system": self.system, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class DCGANTraining(TrainConfig):
    """Train a DCGAN: transposed convolutions against strided ones (Radford et al. 2015).

    Non-saturating loss, lazy R1 penalty, averaged generator weights.
    """

    system: ClassVar[str] = "dcgan"

    image_size: Literal[32, 64, 128] = 32
    """Height and width of the images."""
    nz: int = 64
    """Length of the noise vector."""
    ngf: int = 32
    """Channels of the generator's last hidden layer."""
    ndf: int = 32
    """Channels of the discriminator's first layer."""
    lr: float = 2e-3
    """Learning rate of both networks (Adam)."""
    lr_decay_from: float = 0.4
    """Share of the steps after which the learning rate falls linearly to 0; 1 keeps it."""
    beta1: float = 0.0
    """Adam's first decay rate."""
    beta2: float = 0.99
    """Adam's second decay rate."""
    r1_gamma: float = 1.0
    """Weight of the R1 gradient penalty on real images; 0 is none."""
    r1_every: int = 8
    """Steps between R1 penalties, each weighted by this number (lazy regularisation)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("nz", 2**13), ("ngf", 2**13), ("ndf", 2**13), ("r1_every", 10**9)):
            self._check_between(name, 1, most)
        for name in ("beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._check("lr_decay_from", 0 <= self.lr_decay_from <= 1, "between 0 and 1")
        self._check("lr", 0 < self.lr < float("inf"), "positive")
        self._check("r1_gamma", 0 <= self.r1_gamma < float("inf"), "at least 0")


CONFIGS: dict[str, type[TrainConfig]] = {config.system: config for config in (DCGANTraining,)}


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
