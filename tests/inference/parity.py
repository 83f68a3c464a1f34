"""Two models that should compute the same, and the differences that rounding explains.

A fused op or a plan sums in a different order than the modules. In float64 this makes almost no difference, so any
difference is a fault: whatever can be compared in float64 is.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Of fused models, relative to the largest entry.
FLOAT64 = 1e-9  # thousands of roundings below any fault
FLOAT32 = 1e-4  # about 1000 roundings: norms over few values amplify them in gradients
TOLERANCE = {torch.float64: FLOAT64, torch.float32: 2 * FLOAT32}  # of outputs, gradients and statistics of networks

# Of an engine beside its model, both in float32, element by element, for values near 1.
FEW_LAYERS = {"rtol": 1e-5, "atol": 1e-5}  # about 100 roundings
NETWORK = {"rtol": 1e-4, "atol": 1e-5}  # more layers, possibly computed by Winograd's algorithm

# Relative L2 differences from float64 that are always allowed: a correct network may reach them by chance although
# PyTorch's own error is smaller. In fp32 Winograd's algorithm over a whole network; in bf16 five roundings.
FLOOR = {"fp32": 1e-5, "bf16": 1e-2}


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    """The network in evaluation mode, with parameters and statistics as after some training."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.4)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def assert_parity(engine: Callable, model: nn.Module, x: Tensor, precision: str = "fp32") -> None:
    """The engine's error against float64 is at most twice that of PyTorch in the same precision, or the floor."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with torch.no_grad():
        expected = copy.deepcopy(model).to(dtype)(x.to(dtype))
        exact = copy.deepcopy(model).double()(x.double())
    found = engine(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert relative_error(found, exact) <= max(2 * relative_error(expected, exact), FLOOR[precision])


def tensors(output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in tensors(part)]


def assert_close(found, expected, tolerance: float, what: str) -> None:
    assert (found is None) == (expected is None), what
    if expected is not None:
        assert found.shape == expected.shape and found.dtype == expected.dtype, what
        scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}")


def assert_same_state(fused: nn.Module, plain: nn.Module, tolerance: float) -> None:
    expected = plain.state_dict()
    assert list(fused.state_dict()) == list(expected)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for name, value in fused.state_dict().items():
        assert_close(value.double(), expected[name].double(), tolerance, name)


def assert_same_calls(fused: nn.Module, plain: nn.Module, x: Tensor, tolerance: float) -> None:
    """Compares outputs, gradients of the input and of all parameters, and statistics afterwards, in both modes."""
    for training in (True, False):
        found, grads = [], []
        for model in (fused, plain):
            model.train(training)
            model.zero_grad()
            input = x.clone().requires_grad_()
            torch.manual_seed(1)  # dropout
            outputs = tensors(model(input))
            sum(
                (output * torch.linspace(-1, 1, output.numel()).to(x).view_as(output)).sum() for output in outputs
            ).backward()
            found.append(outputs)
            grads.append({"input": input.grad} | {name: p.grad for name, p in model.named_parameters()})
        for i, (output, expected) in enumerate(zip(*found, strict=True)):
            assert_close(output, expected, tolerance, f"output {i}, training={training}")
        for name, expected in grads[1].items():
            assert_close(grads[0][name], expected, tolerance, f"gradient of {name}, training={training}")
        assert_same_state(fused, plain, tolerance)


def assert_same_training(
    fused: nn.Module, plain: nn.Module, x: Tensor, optimizer: Callable[..., torch.optim.Optimizer], tolerance: float
) -> None:
    """Compares ten steps of an optimizer on a loss of all outputs."""
    losses: list[list[float]] = [[], []]
    for model, seen in zip((fused, plain), losses, strict=True):
        model.train()
        steps = optimizer([p for p in model.parameters() if p.requires_grad])
        torch.manual_seed(2)
        for _ in range(10):
            steps.zero_grad()
            loss = sum((output - 0.5).square().mean() for output in tensors(model(x)))
            loss.backward()
            steps.step()
            seen.append(loss.item())
    for i, pair in enumerate(zip(*losses, strict=True)):
        assert abs(pair[0] - pair[1]) <= tolerance * max(1.0, abs(pair[1])), f"loss of step {i}: {pair}"
    assert_same_state(fused, plain, tolerance)
