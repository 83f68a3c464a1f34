"""The averaged weights."""

import torch

from fastgen.training.ema import EMA, batch_norms_reestimated


def test_average_shares_what_it_does_not_average():
    model = torch.nn.Module()
    model.generator, model.discriminator = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    ema = EMA(model, ["generator"], decay=0.5)
    start = model.generator.weight.detach().clone()
    model.generator.weight.data.add_(1)
    ema.update(step=1000)
    average = ema.modules["generator"]
    torch.testing.assert_close(average.weight, start + 0.5)
    assert ema.model.discriminator is model.discriminator and ema.model.generator is average


def test_average_of_the_whole_model_shares_nothing():
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, [""], decay=0.5)
    assert ema.model is ema.modules[""] is not model and ema.model.weight is not model.weight
    assert model.weight.requires_grad and not ema.model.weight.requires_grad


def test_reestimated_statistics_are_the_mean_over_the_batches():
    norm = torch.nn.BatchNorm2d(2, momentum=0.3).eval()
    batches = torch.randn(5, 8, 2, 3, 3, dtype=torch.float32)
    with batch_norms_reestimated({"norm": norm}) as there_are:
        assert there_are
        for batch in batches:
            norm(batch)
    torch.testing.assert_close(norm.running_mean, batches.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(norm.running_var, batches.transpose(1, 2).flatten(2).var(2).mean(0))
    assert norm.momentum == 0.3 and not norm.training
    with batch_norms_reestimated({"": torch.nn.Linear(1, 1)}) as there_are:
        assert not there_are
