import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from fastgen import losses

REAL, FAKE = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def images(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_zero_logits_give_the_textbook_values():
    zero = torch.zeros(5)
    expected = {
        "minimax": (2 * math.log(2), -math.log(2)), "non_saturating": (2 * math.log(2), math.log(2)), "hinge": (2, 0),
        "least_squares": (0.5, 0.5), "wasserstein": (0, 0),
    }  # fmt: skip
    found = {name: (d(zero, zero).item(), g(zero).item()) for name, (d, g) in losses.GAN_LOSSES.items()}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name


def test_losses_are_the_formulas_in_probabilities():
    d_real, d_fake = REAL.sigmoid(), FAKE.sigmoid()
    expected = -d_real.log().mean() - (1 - d_fake).log().mean()
    torch.testing.assert_close(losses.minimax_discriminator_loss(REAL, FAKE), expected)
    torch.testing.assert_close(losses.minimax_generator_loss(FAKE), (1 - d_fake).log().mean())
    torch.testing.assert_close(losses.non_saturating_generator_loss(FAKE), -d_fake.log().mean())


# d(loss)/d(logit), times the number of logits: of the real, of the generated, and of the generator's loss
GRADIENTS = {
    "minimax": (lambda r: -(-r).sigmoid(), lambda f: f.sigmoid(), lambda f: -f.sigmoid()),
    "non_saturating": (lambda r: -(-r).sigmoid(), lambda f: f.sigmoid(), lambda f: -(-f).sigmoid()),
    "hinge": (lambda r: -(r < 1).double(), lambda f: (f > -1).double(), lambda f: -torch.ones_like(f)),
    "least_squares": (lambda r: r - 1, lambda f: f, lambda f: f - 1),
    "wasserstein": (lambda r: -torch.ones_like(r), torch.ones_like, lambda f: -torch.ones_like(f)),
}


@pytest.mark.parametrize("name", losses.GAN_LOSSES)
def test_adversarial_gradients_equal_hand_computed_ones(name):
    discriminator_loss, generator_loss = losses.GAN_LOSSES[name]
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    found = torch.autograd.grad(discriminator_loss(real, fake), (real, fake))
    found += torch.autograd.grad(generator_loss(fake), fake)
    for gradient, formula, logits in zip(found, GRADIENTS[name], (REAL, FAKE, FAKE), strict=True):
        torch.testing.assert_close(gradient * len(logits), formula(logits))


def test_confident_discriminator_gives_finite_losses():
    real, fake = torch.tensor([-1e4]), torch.tensor([1e4])
    assert losses.minimax_discriminator_loss(real, fake).item() == 2e4
    assert losses.non_saturating_generator_loss(-fake).item() == 1e4


def test_r1_is_the_squared_gradient_and_differentiable():
    x = images(3, 2, 4, 4).requires_grad_()
    weight = images(32, seed=2).requires_grad_()
    penalty = losses.r1_penalty(x.flatten(1).square() @ weight, x)
    torch.testing.assert_close(penalty, (2 * x.flatten(1) * weight).square().sum(1).mean())
    penalty.backward()
    expected = (8 * x.detach().flatten(1).square() * weight.detach()).mean(0)
    torch.testing.assert_close(weight.grad, expected)


def test_gradient_penalty_of_a_linear_discriminator():
    weight = images(32).requires_grad_()
    real, fake = images(5, 2, 4, 4, seed=2), images(5, 2, 4, 4, seed=3).requires_grad_()
    penalty = losses.gradient_penalty(lambda x: x.flatten(1) @ weight, real, fake)
    torch.testing.assert_close(penalty, (weight.norm() - 1).square())
    penalty.backward()
    torch.testing.assert_close(weight.grad, (2 * (weight.norm() - 1) * weight / weight.norm()).detach())
    assert fake.grad is None


def test_gradient_penalty_draws_its_points_from_the_generator():
    seen = []

    def discriminator(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        losses.gradient_penalty(discriminator, torch.zeros(9, 1, 2, 2), torch.ones(9, 1, 2, 2), generator=generator)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    shares = seen[0].flatten(1)
    assert (shares == shares[:, :1]).all() and 0 <= shares.min() < shares.max() <= 1


def test_clipped_weights():
    weights = [torch.tensor([-3.0, 0.005, 3.0], requires_grad=True), torch.tensor([[0.5]])]
    losses.clip_weights_(iter(weights), 0.01)
    assert torch.equal(weights[0].detach(), torch.tensor([-0.01, 0.005, 0.01])) and weights[1].item() == pytest.approx(
        0.01
    )


def test_gaussian_kl_and_its_gradient():
    mu, logvar = images(3, 4).requires_grad_(), images(3, 4, seed=2).requires_grad_()
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    kl = losses.gaussian_kl(mu, logvar)
    torch.testing.assert_close(kl, expected)
    of_mu, of_logvar = torch.autograd.grad(kl.sum(), (mu, logvar))
    torch.testing.assert_close(of_mu, mu.detach())
    torch.testing.assert_close(of_logvar, ((logvar.exp() - 1) / 2).detach())


def test_likelihoods():
    x, y, log_std = images(3, 2, 4, 4).tanh(), images(3, 2, 4, 4, seed=2).tanh().requires_grad_(), torch.tensor(-0.7)
    expected = -torch.distributions.Normal(y, log_std.double().exp()).log_prob(x).flatten(1).sum(1)
    nll = losses.gaussian_nll(y, x, log_std)
    torch.testing.assert_close(nll, expected)
    (gradient,) = torch.autograd.grad(nll.sum(), y)
    torch.testing.assert_close(gradient, ((y - x) * torch.exp(-2 * log_std.double())).detach())
    nll = losses.bernoulli_nll(y, x)
    p, target = (y + 1) / 2, (x + 1) / 2
    torch.testing.assert_close(nll, binary_cross_entropy(p, target, reduction="none").sum((1, 2, 3)))
    (gradient,) = torch.autograd.grad(nll.sum(), y)
    torch.testing.assert_close(gradient, ((p - target) / (p * (1 - p)) / 2).detach())


def test_distances_between_images():
    x, y = images(3, 1, 4, 4), images(3, 1, 4, 4, seed=2).requires_grad_()
    for loss, expected in ((losses.l1_loss, (y - x).sign()), (losses.l2_loss, 2 * (y - x))):
        (gradient,) = torch.autograd.grad(loss(y, x), y)
        torch.testing.assert_close(gradient * x.numel(), expected.detach())
    zero, one, two = (torch.full((2, 1, 2, 2), value) for value in (0.0, 1.0, 2.0))
    assert losses.cycle_loss((zero, two), (one, zero)).item() == 3
    assert losses.identity_loss((zero, zero), (one, zero)).item() == 1


def test_feature_matching_compares_means_and_trains_the_generator_alone():
    real = [images(4, 3).requires_grad_(), images(4, 2, 2, 2, seed=2).requires_grad_()]
    fake = [images(6, 3, seed=3).requires_grad_(), images(6, 2, 2, 2, seed=4).requires_grad_()]
    loss = losses.feature_matching_loss(real, fake)
    by_hand = [(r.mean(0) - f.mean(0)).square().mean() for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(loss, (by_hand[0] + by_hand[1]) / 2)
    loss.backward()
    torch.testing.assert_close(fake[0].grad[0], ((fake[0].mean(0) - real[0].mean(0)) / 3 / 6).detach())
    assert real[0].grad is None
