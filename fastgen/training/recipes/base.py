from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgen.data import ImageDataset
from fastgen.errors import CheckpointError
from fastgen.models import create_model
from fastgen.training.config import TrainConfig
from fastgen.training.ema import EMA


class Recipe(ABC):
    """One system's training: its model, optimizers and averaged weights, and what a step does.

    A subclass names its model, gives that model's options, makes its optimizers and writes `step`; the loop does the
    rest.

    Args:
        config: the run's settings.
        data: what to learn from.
        device: where to train.
        noise: source of everything random in a step, on the CPU, so that a checkpoint moves between devices.
        state: what `tensors` returned, to go on from there. It is checked before anything of the sizes that `config`
            asks for is made, so a file that makes up its settings costs no memory.

    Raises:
        CheckpointError: `state` is not that of this recipe with these settings.
    """

    model_name: ClassVar[str]
    averaged: ClassVar[str] = "generator"
    """The submodule whose averaged weights make the samples."""
    config: Any
    model: Any

    def __init__(
        self,
        config: TrainConfig,
        data: ImageDataset,
        device: torch.device,
        noise: torch.Generator,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.noise = noise
        self.data = data
        self.device = device
        self.model_options = self.make_model_options(data)
        if state is not None:
            with torch.device("meta"):
                _check_fits(create_model(self.model_name, **self.model_options), _under(state, "model."), "model.")
        model: Any = create_model(self.model_name, **self.model_options)
        self.model = model.to(device, memory_format=torch.channels_last)  # a quarter faster on the CPU too
        self.optimizers = self.make_optimizers()
        self.ema = EMA(self.model, self.averaged, config.ema_decay)
        if state is not None:
            self._load(state)

    @abstractmethod
    def make_model_options(self, data: ImageDataset) -> dict[str, Any]:
        """Options of `create_model`."""

    @abstractmethod
    def make_optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by name."""

    @abstractmethod
    def step(self, step: int, indices: Tensor) -> dict[str, Tensor]:
        """Trains on the data at `indices`; returns the losses by name, detached scalars. `step` counts from 0."""

    @abstractmethod
    def finish_average(self) -> None:
        """Makes the averaged model fit to sample from: re-estimates the statistics of its norms, if it has any."""

    def sample(self, n: int, seed: int) -> Tensor:
        """Images (n, C, H, W) of the averaged model; its statistics must be finished."""
        return self.ema.model.sample(n, generator=torch.Generator().manual_seed(seed))

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, flat: the weights, their average, the optimizers' moments and the noise source."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        named |= {f"ema.{name}": tensor for name, tensor in self.ema.module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                named |= {f"optimizer.{name}.{index}.{key}": value for key, value in state.items()}
        return named | {"rng.noise": self.noise.get_state(), "rng.torch": torch.get_rng_state()}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        load_module(self.model, tensors, "model.")
        load_module(self.ema.module, tensors, "ema.")
        for name, optimizer in self.optimizers.items():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in _under(tensors, f"optimizer.{name}.").items():
                index, _, moment = key.partition(".")
                if not index.isdecimal() or int(index) >= len(parameters):
                    raise CheckpointError(f"the checkpoint's optimizer {name} has more parameters than the model")
                parameter = parameters[int(index)]
                if tensor.dim():
                    if tensor.shape != parameter.shape:
                        raise CheckpointError(f"the checkpoint's optimizer.{name}.{key} does not fit the model")
                    # a fused optimizer walks memory, so the moments need the parameter's strides
                    tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
                state.setdefault(int(index), {})[moment] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        try:
            self.noise.set_state(tensors["rng.noise"])
            torch.set_rng_state(tensors["rng.torch"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError("the checkpoint's random state is missing or damaged") from error


def load_module(module: nn.Module, tensors: dict[str, Tensor], prefix: str = "", *, assign: bool = False) -> None:
    """Loads the tensors under `prefix` into a module, whole and of the module's own shapes and dtypes.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape.
    """
    given = _under(tensors, prefix)
    _check_fits(module, given, prefix)
    module.load_state_dict(given, assign=assign)


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


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
