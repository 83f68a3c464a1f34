"""The networks of a system, model or run folder, with the inputs that they get in a training step: for `tune` and
`info --explain`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fastgen.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Dtype: TypeAlias = Literal["fp32", "bf16", "fp16"]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]


def networks(
    system: str, batch: int, dtype: Dtype, channels_last: bool, device: Device
) -> tuple[list[tuple[str, nn.Module, list[Tensor]]], Callable[[], torch.autocast]]:
    """(title, network, its inputs for `batch` images) for each network, on the device and in its memory format; and a
    function that makes the autocast context to run them in. Raises UsageError for a name that is not a system, model or
    run folder."""
    import torch

    import fastgen
    from fastgen.training import load_model
    from fastgen.training.loop import choose_device
    from fastgen.training.recipes import RECIPES

    if not 1 <= batch <= 2**16:
        raise UsageError(f"batch must be between 1 and {2**16}, not {batch}")
    if Path(system).is_dir():
        model: Any = load_model(Path(system))
    else:
        model = fastgen.create_model(getattr(RECIPES.get(system), "model_name", system))
    where, order = choose_device(device), torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(where, memory_format=order).requires_grad_()
    layout = ", channels_last" if channels_last else ""
    found = [
        (
            f"{name or 'model'}, batch {batch}, {dtype}{layout}, on {where}",
            model.get_submodule(name),
            [t.to(where, memory_format=order) if t.dim() == 4 else t.to(where) for t in inputs],
        )
        for name, inputs in model.example_inputs(batch).items()
    ]
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return found, lambda: torch.autocast(where.type, precision, enabled=dtype != "fp32")
