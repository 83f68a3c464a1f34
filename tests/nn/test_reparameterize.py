import torch

import fastgen.nn
from fastgen import ops


def test_module_is_the_op():
    mu, logvar = torch.randn(4, 6), torch.randn(4, 6)
    for module, call in (
        (fastgen.nn.Reparameterize(), lambda: ops.reparameterize(mu, logvar)),
        (
            fastgen.nn.Reparameterize(
                kl=True, beta=0.5, prior_mean=1.0, num_samples=3, logvar_range=(-5, 5), free_bits=0.1
            ),
            lambda: ops.reparameterize_kl(
                mu, logvar, beta=0.5, prior_mean=1.0, num_samples=3, logvar_range=(-5, 5), free_bits=0.1
            ),
        ),
    ):
        torch.manual_seed(0)
        expected = call()
        assert not module.state_dict() and "num_samples" in repr(module)
        torch.manual_seed(0)
        torch.testing.assert_close(module(mu, logvar), expected, rtol=0, atol=0)
        generator = torch.Generator().manual_seed(0)
        torch.testing.assert_close(module.eval()(mu, logvar, generator), expected, rtol=0, atol=0)
