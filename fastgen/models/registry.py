import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fastgen.errors import unknown_name
from fastgen.options import with_current_names


class _Entry(NamedTuple):
    model: type[nn.Module]
    config: type


_MODELS: dict[str, _Entry] = {}


def register_model(name: str, config: type) -> Callable[[type], type]:
    """Class decorator that registers a model under `name`. Its only argument is an instance of `config`, a frozen
    dataclass; it declares its inputs and outputs in `capabilities` (see `fastgen.models.Capabilities`)."""

    def register(model: type) -> type:
        if name in _MODELS:
            raise ValueError(f"model {name!r} is registered twice: {_MODELS[name].model} and {model}")
        _MODELS[name] = _Entry(model, config)
        return model

    return register


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(_MODELS)


def create_model(name: str, **options: Any) -> nn.Module:
    """A freshly initialised model.

    As with every nn.Module, its parameters have PyTorch's default dtype and device; tensors that it creates later have
    its parameters'.

    Args:
        name: one of `list_models()`.
        options: fields of the model's config (e.g. `fastgen.models.DCGANConfig`); the others keep their defaults.

    Raises:
        UsageError: the name, an option's name or an option's value is unknown; the message has the nearest names.
    """
    model, config = _entry(name)
    fields = [field.name for field in dataclasses.fields(config)]
    options = with_current_names(config, options)
    for option in options:
        if option not in fields:
            raise unknown_name(f"option of model {name}", option, fields)
    return model(config(**options))


def config_class(name: str) -> type:
    """The dataclass of a model's options.

    Raises:
        UsageError: unknown name.
    """
    return _entry(name).config


def _entry(name: str) -> _Entry:
    if not isinstance(name, str) or name not in _MODELS:
        raise unknown_name("model", name, _MODELS)
    return _MODELS[name]
