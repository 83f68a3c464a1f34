import math

import pytest
import torch

from fastgen import losses


def test_zero_logits_give_the_textbook_values():
    zero = torch.zeros(5)
    assert losses.minimax_discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert losses.minimax_generator_loss(zero).item() == pytest.approx(-math.log(2))
    assert losses.non_saturating_generator_loss(zero).item() == pytest.approx(math.log(2))
    assert losses.hinge_discriminator_loss(zero, zero).item() == 2
    assert losses.hinge_generator_loss(zero).item() == 0


def test_losses_are_the_formulas_in_probabilities():
    real, fake = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    expected = -d_real.log().mean() - (1 - d_fake).log().mean()
    torch.testing.assert_close(losses.minimax_discriminator_loss(real, fake), expected)
    torch.testing.assert_close(losses.minimax_generator_loss(fake), (1 - d_fake).log().mean())
    torch.testing.assert_close(losses.non_saturating_generator_loss(fake), -d_fake.log().mean())


def test_sure_discriminator_stays_finite():
    real, fake = torch.tensor([-1e4]), torch.tensor([1e4])
    assert losses.minimax_discriminator_loss(real, fake).item() == 2e4
    assert losses.non_saturating_generator_loss(-fake).item() == 1e4


def test_r1_is_the_squared_gradient_and_differentiable():
    images = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(32, dtype=torch.float64, requires_grad=True)
    penalty = losses.r1_penalty(images.flatten(1).square() @ weight, images)
    torch.testing.assert_close(penalty, (2 * images.flatten(1) * weight).square().sum(1).mean())
    penalty.backward()
    expected = (8 * images.detach().flatten(1).square() * weight.detach()).mean(0)
    torch.testing.assert_close(weight.grad, expected)
