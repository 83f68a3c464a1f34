from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.overrides import TorchFunctionMode

from fastgen.data import Batch, BatchSampler, DomainPair, ImageDataset
from fastgen.errors import CheckpointError, DataError
from fastgen.models import create_model
from fastgen.models.registry import config_class
from fastgen.training.config import TrainConfig
from fastgen.training.ema import EMA, batch_norms_reestimated


class Recipe(ABC):
    """One system's training: its model, optimizers, averaged weights and training step.

    A subclass sets the model's name and options, says which optimizer trains which submodules, and implements `step`;
    the loop does the rest. A step must take its data from `next_batches` and its random numbers from `self.noise` or
    torch's global generator, or a resumed run would differ.

    Args:
        config: the run's settings.
        data: the training data.
        device: where to train.
        noise: a random number generator on the CPU, so that a checkpoint can move between devices.
        state: what `tensors` returned, to continue from. It is checked before memory is allocated for the sizes in
            `config`, so that a file with made-up settings costs no memory.

    Raises:
        CheckpointError: `state` does not fit this recipe with these settings.
        DataError: the data lacks what the system learns from.
    """

    model_name: str
    parts: ClassVar[dict[str, tuple[str, ...]]]
    """Name of an optimizer -> the submodules that it trains; "" is the whole model."""
    averaged: ClassVar[tuple[str, ...]] = ("generator",)
    """The submodules whose weights are averaged; samples are drawn with the averages."""
    config: Any
    model: Any

    def __init__(
        self,
        config: TrainConfig,
        data: ImageDataset | DomainPair,
        device: torch.device,
        noise: torch.Generator,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.noise = noise
        self.data: Any = data
        self.device = device
        self.sources = [data.a, data.b] if isinstance(data, DomainPair) else [data]
        self.samplers = [
            BatchSampler(len(source), config.batch_size, config.seed + at) for at, source in enumerate(self.sources)
        ]
        self.model_options = self.make_model_options()
        if state is not None:
            with plain_defaults("meta"):
                _check_fits(create_model(self.model_name, **self.model_options), _under(state, "model."), "model.")
        with plain_defaults():
            model: Any = create_model(self.model_name, **self.model_options)
        self.model = model.to(device, memory_format=torch.channels_last)  # a quarter faster on the CPU too
        self.extra = self.make_extra().to(device)
        self.optimizers = {name: self._make_optimizer(parts) for name, parts in self.parts.items()}
        self.ema = EMA(self.model, self.averaged, config.ema_decay)
        if state is not None:
            self.load(state)

    @abstractmethod
    def make_model_options(self) -> dict[str, Any]:
        """Options of `create_model`."""

    def shared_options(self, **others: Any) -> dict[str, Any]:
        """The settings that are options of the model too, and `others`."""
        names = {field.name for field in fields(config_class(self.model_name))}
        shared = {name: getattr(self.config, name) for name in names & {field.name for field in fields(self.config)}}
        return shared | others

    @abstractmethod
    def step(self, step: int) -> dict[str, Tensor]:
        """Runs one training step, counted from 0; returns the losses by name, as detached scalars."""

    @abstractmethod
    def calibrate(self, model: Any) -> None:
        """Runs the averaged model on the inputs from which to estimate the statistics of its norms."""

    @abstractmethod
    def sample(self, n: int, seed: int) -> Tensor:
        """Images (n, C, H, W) of the averaged model, whose statistics must be estimated."""

    def make_extra(self) -> nn.Module:
        """A module whose buffers are the state besides the model."""
        return nn.Module()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the model's classes; None if it has none."""
        return None

    def single_dataset(self) -> ImageDataset:
        """The data.

        Raises:
            DataError: it is two domains.
        """
        if isinstance(self.data, DomainPair):
            raise DataError(
                f"{self.config.system} learns from one set of images, but {self.config.data} has two domains"
            )
        return self.data

    # for `step`

    def next_batches(self) -> list[Batch]:
        """The next batch of each source, on the device."""
        batches = []
        for source, sampler in zip(self.sources, self.samplers, strict=True):
            indices = sampler.next()
            source.prefetch(sampler.peek())  # decoded in the background
            batches.append(source.batch(indices).to(self.device))
        return batches

    def autocast(self) -> torch.autocast:
        """The context for computation that may be in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def update(self, name: str, loss: Tensor) -> None:
        """One step of the optimizer `name` on `loss`."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        if self.config.clip_grad:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
        optimizer.step()

    # for the loop

    def advance(self, step: int) -> dict[str, Tensor]:
        """Sets the learning rate, runs `step`, and updates the average of the weights."""
        start, progress = self.config.lr_decay_from, step / self.config.steps
        factor = (1 - progress) / (1 - start) if progress > start else 1.0
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * factor
        losses = self.step(step)
        self.ema.update(step)
        return losses

    @torch.no_grad()
    def finish_average(self) -> None:
        """Re-estimates the statistics of the averaged model's batch norms, if any, so that it can be sampled from."""
        with batch_norms_reestimated(self.ema.modules) as has_norms:
            if has_norms:
                self.calibrate(self.ema.model)

    @property
    def position(self) -> int:
        """Images drawn from each source so far."""
        return self.samplers[0].position

    @position.setter
    def position(self, position: int) -> None:
        for sampler in self.samplers:
            sampler.position = position

    def tensors(self) -> dict[str, Tensor]:
        """The whole state except `position`, flat: weights, averages, optimizer moments, random number generators."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        named |= {f"extra.{name}": tensor for name, tensor in self.extra.state_dict().items()}
        for part, module in self.ema.modules.items():
            named |= {_join("ema", part, name): tensor for name, tensor in module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                named |= {f"optimizer.{name}.{index}.{key}": value for key, value in state.items() if value is not None}
        if self.device.type == "cuda":
            named["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return named | {"rng.noise": self.noise.get_state(), "rng.torch": torch.get_rng_state()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`.

        Raises:
            CheckpointError: they do not fit this recipe with these settings.
        """
        load_module(self.model, tensors, "model.")
        load_module(self.extra, tensors, "extra.")
        for part, module in self.ema.modules.items():
            load_module(module, tensors, _join("ema", part, ""))
        for name, optimizer in self.optimizers.items():
            _load_optimizer(name, optimizer, _under(tensors, f"optimizer.{name}."))
        try:
            self.noise.set_state(tensors["rng.noise"])
            torch.set_rng_state(tensors["rng.torch"])
            if self.device.type == "cuda" and "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        except (KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError("the checkpoint's random state is missing or damaged") from error

    def _make_optimizer(self, parts: tuple[str, ...]) -> Optimizer:
        config = self.config
        parameters = [parameter for part in parts for parameter in self.model.get_submodule(part).parameters()]
        if config.optimizer == "sgd":
            return SGD(parameters, config.lr, config.beta1, fused=True)
        return Adam(parameters, config.lr, (config.beta1, config.beta2), fused=True)


class _Float32(TorchFunctionMode):
    """Tensors created without a dtype are float32 in the context and in this thread, whatever torch.set_default_dtype
    says."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return function(*args, **kwargs)


@contextlib.contextmanager
def plain_defaults(device: str = "cpu") -> Iterator[None]:
    """Models created in the context are float32 on `device`, whatever defaults the process has set."""
    with torch.device(device), _Float32():
        yield


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the context gradients pass through the module, but its parameters get none."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def load_module(module: nn.Module, tensors: dict[str, Tensor], prefix: str = "", *, assign: bool = False) -> None:
    """Loads the tensors under `prefix` into a module; names, shapes and dtypes must be the module's.

    Raises:
        CheckpointError: names the tensor that is missing, unknown or of another shape or dtype.
    """
    state = _under(tensors, prefix)
    _check_fits(module, state, prefix)
    module.load_state_dict(state, assign=assign)


def _load_optimizer(name: str, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, moment = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise CheckpointError(f"the checkpoint's optimizer {name} has more parameters than the model")
        parameter = parameters[int(index)]
        if moment != "step":
            if tensor.shape != parameter.shape:
                raise CheckpointError(f"the checkpoint's optimizer.{name}.{key} does not fit the model")
            # a fused optimizer goes through memory linearly, so the moments need the parameter's strides
            tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        state.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_fits(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    expected = module.state_dict()
    for name in [*expected, *state]:
        if name not in state:
            raise CheckpointError(f"the checkpoint is of another architecture: it has no {prefix}{name}")
        if name not in expected:
            raise CheckpointError(f"the checkpoint is of another architecture: the model has no {prefix}{name}")
        if (state[name].shape, state[name].dtype) != (expected[name].shape, expected[name].dtype):
            raise CheckpointError(
                f"the checkpoint is of another architecture: {prefix}{name} is {_describe(state[name])} in it and "
                f"{_describe(expected[name])} in the model"
            )


def _join(*names: str) -> str:
    return ".".join(name for at, name in enumerate(names) if name or at == len(names) - 1)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
