from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from fastgen.errors import UsageError


def tune(
    system: Positional[str],
    batch: int = 64,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    channels_last: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    training: bool = True,
    seconds: float = 120.0,
) -> None:
    """Measure which implementation of each convolution is fastest here, once; from then on it is taken.

    Args:
        system: Name of a system or model (`dcgan`, `vae`, ...), at its usual size, or a run folder that `fastgen train`
            left.
        batch: Images at a time, as in the run to come.
        dtype: Precision, under autocast but for fp32.
        channels_last: Images and weights in channels_last order, as `fastgen train` has them.
        device: Where to measure; auto takes a GPU if there is one.
        training: Measure gradients and statistics of the batch too.
        seconds: How long to measure.
    """
    import sys

    import torch

    import fastgen
    from fastgen.training import load_model
    from fastgen.training.loop import choose_device
    from fastgen.training.recipes import RECIPES

    if not 1 <= batch <= 2**16:
        raise UsageError(f"batch must be between 1 and {2**16}, not {batch}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be positive and finite, not {seconds}")
    if Path(system).is_dir():
        model = load_model(Path(system))
    else:
        model = fastgen.create_model(getattr(RECIPES.get(system), "model_name", system))
    where, order = choose_device(device), torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(where, memory_format=order).requires_grad_()  # type: ignore[call-overload]
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    parts = _networks(model, batch)
    for name, (part, inputs) in parts.items():
        given = (t.to(where, memory_format=order) if t.dim() == 4 else t.to(where) for t in inputs)
        with torch.autocast(where.type, precision, enabled=dtype != "fp32"):
            report = fastgen.tune(
                part,
                *given,
                training=training,
                seconds=seconds / len(parts),
                progress=lambda line: print(line, file=sys.stderr),
            )
        print(f"{name}, batch {batch}, {dtype}{', channels_last' if channels_last else ''}, on {where}\n{report}")


def _networks(model: Any, n: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """What a training step runs of a model, each with inputs of n images."""
    import inspect

    import torch

    config = model.config
    cpu: Any = {"dtype": torch.float32, "device": "cpu"}

    def images(channels: int) -> Any:
        return torch.rand(n, channels, config.image_size, config.image_size, **cpu) * 2 - 1

    if hasattr(model, "a_to_b"):
        a, b = images(config.channels_a), images(config.channels_b)
        networks = {"a_to_b": a, "b_to_a": b, "discriminator_a": a, "discriminator_b": b}
        return {name: (getattr(model, name), (given,)) for name, given in networks.items()}
    if hasattr(model, "encode"):
        return {"model": (model, (images(config.channels),))}
    takes = list(inspect.signature(model.generate).parameters)[1:]
    conditions = {
        "labels": lambda: torch.arange(n, device="cpu") % config.classes,
        "condition": lambda: torch.randn(n, config.condition, **cpu),
    }
    given = tuple(conditions[name]() for name in takes)
    return {
        "generator": (model.generator, (torch.randn(n, config.nz, **cpu), *given)),
        "discriminator": (model.discriminator, (images(config.channels), *given)),
    }
