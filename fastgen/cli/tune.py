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
        model: Any = load_model(Path(system))
    else:
        model = fastgen.create_model(getattr(RECIPES.get(system), "model_name", system))
    where, order = choose_device(device), torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(where, memory_format=order).requires_grad_()  # type: ignore[call-overload]
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    networks = model.example_inputs(batch)
    for name, inputs in networks.items():
        given = (t.to(where, memory_format=order) if t.dim() == 4 else t.to(where) for t in inputs)
        with torch.autocast(where.type, precision, enabled=dtype != "fp32"):
            report = fastgen.tune(
                model.get_submodule(name),
                *given,
                training=training,
                seconds=seconds / len(networks),
                progress=lambda line: print(line, file=sys.stderr),
            )
        layout = ", channels_last" if channels_last else ""
        print(f"{name or 'model'}, batch {batch}, {dtype}{layout}, on {where}\n{report}")
