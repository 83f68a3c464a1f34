"""Two models that should compute the same."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}  # relative to the largest entry


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
    """Outputs, gradients of the input and of all parameters, and statistics afterwards, in training and not."""
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
    """Ten steps of an optimizer on a loss that looks at every output."""
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
