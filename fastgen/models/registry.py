import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fastgen.errors import UsageError, unknown_name


class _Entry(NamedTuple):
    model: type[nn.Module]
    config: type


MOST = 2**16  # of any size in a config
_MODELS: dict[str, _Entry] = {}


def register_model(name: str, config: type) -> Callable[[type], type]:
    """Class decorator: makes the model, whose only argument is its frozen dataclass `config`, known by `name`."""

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

    Args:
        name: one of `list_models()`.
        options: fields of the model's config (e.g. `fastgen.models.DCGANConfig`); the others keep their defaults.

    Raises:
        UsageError: the name, an option's name or an option's value is unknown; the message holds the nearest names.

    As in every nn.Module, parameters have PyTorch's default dtype and device; what a model makes later has its
    parameters'.
    """
    if not isinstance(name, str) or name not in _MODELS:
        raise unknown_name("model", name, _MODELS)
    model, config = _MODELS[name]
    fields = [field.name for field in dataclasses.fields(config)]
    for option in options:
        if option not in fields:
            raise unknown_name(f"option of model {name}", option, fields)
    return model(config(**options))


def check_positive(config: Any, *names: str, most: int = MOST) -> None:
    """Raises UsageError unless the config's fields `names` are integers from 1 to `most`."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise UsageError(f"{name} must be a positive integer, not {reprlib.repr(value)}")
        if value > most:
            raise UsageError(f"{name} must be at most {most}, not {reprlib.repr(value)}")


def check_choice(config: Any, **choices: tuple) -> None:
    """Raises UsageError unless each named field has one of its choices."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):  # 1 and 1.0 are not True
            listed = " or ".join((", ".join(map(repr, allowed[:-1])), repr(allowed[-1])))
            raise UsageError(f"{name} must be {listed}, not {reprlib.repr(value)}")
