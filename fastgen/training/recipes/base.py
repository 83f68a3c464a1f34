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
    """One system's training: its model, optimizers and averaged weights, and what a step does.

    A subclass names its model and that model's options, says which optimizer trains which parts, and writes `step`; the
    loop does the rest. A step takes its data from `next_batches` and all that is random from `self.noise` or torch's
    own generator, or a resumed run would differ.

    Args:
        config: the run's settings.
        data: what to learn from.
        device: where to train.
        noise: a source of random numbers on the CPU, so that a checkpoint moves between devices.
        state: what `tensors` returned, to go on from there. It is checked before anything of the sizes that `config`
            asks for is made, so a file that makes up its settings costs no memory.

    Raises:
        CheckpointError: `state` is not that of this recipe with these settings.
        DataError: the data lacks what the system learns from.
    """

    model_name: str
    parts: ClassVar[dict[str, tuple[str, ...]]]
    """Optimizer -> the submodules that it trains; "" is the whole model."""
    averaged: ClassVar[tuple[str, ...]] = ("generator",)
    """The submodules whose averaged weights make the samples."""
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
        """Trains once; returns the losses by name, detached scalars. `step` counts from 0."""

    @abstractmethod
    def calibrate(self, model: Any) -> None:
        """Runs the averaged model on what the statistics of its norms are to be estimated from, without gradients."""

    @abstractmethod
    def sample(self, n: int, seed: int) -> Tensor:
        """Images (n, C, H, W) of the averaged model; its statistics must be finished."""

    def make_extra(self) -> nn.Module:
        """What has state besides the model, as buffers."""
        return nn.Module()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """What the labels that the model is given stand for; None if it is given none."""
        return None

    def one_set(self) -> ImageDataset:
        """The data.

        Raises:
            DataError: it is two domains.
        """
        if isinstance(self.data, DomainPair):
            raise DataError(
                f"{self.config.system} learns from one set of images, and {self.config.data} is two domains"
            )
        return self.data

    # what a step is made from

    def next_batches(self) -> list[Batch]:
        """The next batch of each source, on the device."""
        batches = []
        for source, sampler in zip(self.sources, self.samplers, strict=True):
            indices = sampler.next()
            source.prefetch(sampler.peek())  # is decoded meanwhile
            batches.append(source.batch(indices).to(self.device))
        return batches

    def autocast(self) -> torch.autocast:
        """The context of what may be computed in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def update(self, name: str, loss: Tensor) -> None:
        """One step of the optimizer `name` down the gradient of `loss`."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        if self.config.clip_grad:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
        optimizer.step()

    # what the loop calls

    def advance(self, step: int) -> dict[str, Tensor]:
        """`step`, with the learning rate before it and the average of the weights after it."""
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
        """Makes the averaged model fit to sample from: re-estimates the statistics of its batch norms, if it has
        any."""
        with batch_norms_reestimated(self.ema.modules) as there_are:
            if there_are:
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
        """The whole state but for `position`, flat: weights, their average, the optimizers' moments, random numbers."""
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
            CheckpointError: they are not of this recipe with these settings.
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
    """What is made without a dtype is float32 in the context, whatever torch.set_default_dtype says; in this thread
    alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return function(*args, **kwargs)


@contextlib.contextmanager
def plain_defaults(device: str = "cpu") -> Iterator[None]:
    """Models that are made in the context are float32 on `device`, whatever the process has set."""
    with torch.device(device), _Float32():
        yield


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through the module in the context, and none of its parameters gets one."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def load_module(module: nn.Module, tensors: dict[str, Tensor], prefix: str = "", *, assign: bool = False) -> None:
    """Loads the tensors under `prefix` into a module, whole and of the module's own shapes and dtypes.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape.
    """
    given = _under(tensors, prefix)
    _check_fits(module, given, prefix)
    module.load_state_dict(given, assign=assign)


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
            # a fused optimizer walks memory, so the moments need the parameter's strides
            tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        state.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_fits(module: nn.Module, given: dict[str, Tensor], prefix: str) -> None:
    wanted = module.state_dict()
    for name in [*wanted, *given]:
        if name not in given:
            raise CheckpointError(f"the checkpoint is of another architecture: it has no {prefix}{name}")
        if name not in wanted:
            raise CheckpointError(f"the checkpoint is of another architecture: the model has no {prefix}{name}")
        if (given[name].shape, given[name].dtype) != (wanted[name].shape, wanted[name].dtype):
            raise CheckpointError(
                f"the checkpoint is of another architecture: {prefix}{name} is {_describe(given[name])} there and "
                f"{_describe(wanted[name])} in the model"
            )


def _join(*names: str) -> str:
    return ".".join(name for at, name in enumerate(names) if name or at == len(names) - 1)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
