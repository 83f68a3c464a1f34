import dataclasses
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("sklearn")

from fastgen.errors import CheckpointError, FastgenError, UsageError
from fastgen.training import DCGANTraining, evaluate, load_model, sample, train
from fastgen.training.checkpoint import load_meta, save_checkpoint
from fastgen.training.config import config_from_json
from fastgen.training.plot import plot_losses
from fastgen.training.recipes import DCGANRecipe
from fastgen.training.run import claim, read_config, read_metrics

TINY = DCGANTraining(steps=7, batch_size=4, nz=4, ngf=2, ndf=2, log_every=2, save_every=3, r1_every=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return train(TINY, folder)


def tensors(folder):
    return load_file(folder / load_meta(folder)["tensors"]["file"])


def losses(folder):
    return [(record["step"], record["losses"]) for record in read_metrics(folder)]


def interrupt_after(monkeypatch, steps, number=signal.SIGINT):
    """Sends this process a signal in the middle of training step `steps`."""
    step = DCGANRecipe.step

    def interrupted(self, at):
        if at == steps - 1:
            os.kill(os.getpid(), number)
        return step(self, at)

    monkeypatch.setattr(DCGANRecipe, "step", interrupted)


def test_run_folder_is_complete(run):
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*.*")}
    assert names == {
        load_meta(run.folder)["tensors"]["file"],
        "checkpoint.json",
        "config.json",
        "evaluation.json",
        "loss.png",
        "metrics.jsonl",
        "report.html",
        *(f"samples/step_{step:06d}.png" for step in (3, 6, 7)),
        "samples.png",
    }
    assert run.step == 7 and not run.interrupted and run.images_per_second > 0
    assert [step for step, _ in losses(run.folder)] == [2, 3, 4, 6, 7]
    assert Image.open(run.folder / "samples.png").size == (10 * 34 + 2, 10 * 34 + 2)
    assert config_from_json(json.loads((run.folder / "config.json").read_text())) == TINY
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    assert evaluation["step"] == 7
    assert evaluation["classifier_sure_share"] == dataclasses.asdict(run.evaluation.recognised)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("steps", [2, 5])
def test_stopped_and_resumed_is_bitwise_the_same(run, tmp_path, monkeypatch, steps, number):
    folder = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)  # a background job of a shell ignores it
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps, number)
        stopped = train(TINY, folder)
    assert stopped.interrupted and stopped.step == steps == load_meta(folder)["step"] and stopped.evaluation is None
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(99)
    resumed = train(TINY, folder, resume=True)
    assert resumed.step == 7 and resumed.evaluation == run.evaluation
    expected, found = tensors(run.folder), tensors(folder)
    assert found.keys() == expected.keys()
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set()
    assert (folder / "samples.png").read_bytes() == (run.folder / "samples.png").read_bytes()


def test_resume_returns_to_the_checkpoint_and_may_extend(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def killed(self, at, step=DCGANRecipe.step):
        if at == 4:
            raise MemoryError
        return step(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(DCGANRecipe, "step", killed)
        with pytest.raises(MemoryError):
            train(TINY, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "losses": {"d"')
    train(TINY, folder, resume=True)
    assert losses(folder) == losses(run.folder), "what lay beyond the checkpoint was trained and logged again"
    longer = train(dataclasses.replace(TINY, steps=9), folder, resume=True)
    assert longer.step == 9 and json.loads((folder / "config.json").read_text())["steps"] == 9


def test_same_seed_same_bits_and_another_seed_others(run, tmp_path):
    torch.manual_seed(5)
    train(TINY, tmp_path / "same")
    train(dataclasses.replace(TINY, seed=1), tmp_path / "other")
    same, other, expected = tensors(tmp_path / "same"), tensors(tmp_path / "other"), tensors(run.folder)
    assert all(torch.equal(same[name], expected[name]) for name in expected)
    assert not torch.equal(other["model.generator.main.0.weight"], expected["model.generator.main.0.weight"])


def poisoned(monkeypatch, at, poison):
    """Runs `poison(model)` before training step `at`, counted from 0, each time that step is run."""

    def step(self, now, step=DCGANRecipe.step):
        if now == at:
            poison(self.model)
        return step(self, now)

    monkeypatch.setattr(DCGANRecipe, "step", step)


def break_forward(model):
    model.generator.main[4].bias.data.fill_(float("nan"))


def break_backward(model):
    model.generator.main[6].weight.register_hook(lambda gradient: gradient * float("inf"))


def break_update(model):
    def spoil(bias):
        bias.grad.fill_(float("inf"))

    model.generator.main[4].bias.register_post_accumulate_grad_hook(spoil)


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (
            break_forward,
            r"d_loss is nan at step 5; it first appears in the output of generator\.main\.4 \(BatchNorm2d\) of step "
            r"5; ",
        ),
        (break_backward, r" at step \d; it first appears in the gradient of generator\.main\.6\.weight of step 5; "),
        (break_update, r" at step \d; it first appears in generator\.main\.4\.bias after the update of step 5; "),
    ],
    ids=["forward", "backward", "update"],
)
def test_non_finite_values_are_traced_and_the_checkpoint_is_kept(tmp_path, monkeypatch, poison, message):
    poisoned(monkeypatch, 4, poison)
    with pytest.raises(FastgenError, match=message + "the checkpoint of step 3 is kept"):
        train(TINY, tmp_path / "run")
    assert load_meta(tmp_path / "run")["step"] == 3
    assert load_model(tmp_path / "run").sample(2).isfinite().all()


def test_a_loss_that_no_layer_explains(tmp_path, monkeypatch):
    def step(self, at, step=DCGANRecipe.step):
        report = step(self, at)
        return report | {"d_loss": report["d_loss"] * float("nan")} if at == 4 else report

    monkeypatch.setattr(DCGANRecipe, "step", step)
    with pytest.raises(
        FastgenError, match=r"d_loss is nan at step 5; no layer shows it when steps 4 to 5 are run again"
    ):
        train(TINY, tmp_path / "run")


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    def broken(self, at, step=DCGANRecipe.step):
        report = step(self, at)
        if at == 5:
            self.model.generator.main[0].weight.data.fill_(float("inf"))
        return report

    monkeypatch.setattr(DCGANRecipe, "step", broken)
    message = (
        r"generator\.main\.0\.weight is not finite at step 6; .* generator\.main\.0\.weight after the update of step 6;"
    )
    with pytest.raises(FastgenError, match=message):
        train(TINY, tmp_path / "run")
    assert load_meta(tmp_path / "run")["step"] == 3


def test_folders_that_cannot_be_a_run(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = tensors(run.folder)
    for folder, message in (
        (run.folder, "already holds a run: continue it with --resume"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "is not empty"),
    ):
        with pytest.raises(FastgenError, match=message):
            train(TINY, folder)
    with pytest.raises(OSError, match="file"):
        train(TINY, tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train(TINY, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    assert tensors(run.folder).keys() == before.keys() and (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_one_process_at_a_time_trains_in_a_folder(run):
    with claim(run.folder, new=False):
        with pytest.raises(FastgenError, match="another process trains in"):
            train(TINY, run.folder, resume=True)
        assert len(load_model(run.folder).sample(1)) == 1, "anybody may draw from it"
    assert train(TINY, run.folder, resume=True).step == 7


def test_resume_refuses_other_settings(run):
    with pytest.raises(UsageError, match="nz of a run cannot change: it is 4, not 5"):
        train(dataclasses.replace(TINY, nz=5), run.folder, resume=True)


def damaged(run, tmp_path, change):
    """A copy of the run's checkpoint whose description was passed through `change`."""
    meta = load_meta(run.folder)
    change(meta)
    state = tensors(run.folder)
    step = meta.pop("step")
    meta.pop("tensors")
    save_checkpoint(tmp_path, step, state, meta)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "describes no known model"),
        ("model", {"name": ["dcgan"], "options": {}, "averaged": ["generator"]}, "describes no known model"),
        ("model", {"name": "dcgan", "options": {"nz": 10**30}, "averaged": ["generator"]}, "describes no known model"),
        ("model", {"name": "dcgan", "options": {"ngf": 2**16}, "averaged": ["generator"]}, "another architecture"),
        (
            "model",
            {"name": "dcgan", "options": {"__class__": 1}, "averaged": ["generator"]},
            "describes no known model",
        ),
        ("model", {"name": "dcgan", "options": {}, "averaged": ["no"]}, "describes no known model"),
        ("model", {"name": "dcgan", "options": {}, "averaged": [7]}, "describes no known model"),
        ("model", {"name": "dcgan", "options": {}, "averaged": ["generator"]}, "another architecture: .*main"),
    ],
    ids=range(8),
)
def test_a_description_that_does_not_fit_its_tensors(run, tmp_path, key, value, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(damaged(run, tmp_path, lambda meta: meta.update({key: value})))


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("config"),
        lambda meta: meta["config"].update(system=[]),
        lambda meta: meta["config"].update(lr="fast"),
        lambda meta: meta["config"].update(nz=4.0),
        lambda meta: meta["config"].update(colour=1),
        lambda meta: meta["config"].update(nz=8192, ngf=8192, ndf=8192),  # 40 GB if it were created
        lambda meta: meta["config"].update(batch_size=10**12),
        lambda meta: meta["config"].update(steps=10**400),
        lambda meta: meta["config"].update(lr=10**400),
        lambda meta: meta.update(position=-4),
        lambda meta: meta.update(position="4"),
    ],
    ids=range(11),
)
def test_resume_from_a_damaged_description(run, tmp_path, change):
    folder = damaged(run, tmp_path, change)
    with pytest.raises(CheckpointError):
        train(read_config(folder), folder, resume=True)


def test_resume_from_tensors_that_do_not_fit(run, tmp_path):
    meta = load_meta(run.folder)
    entry = {name: value for name, value in meta.items() if name not in ("step", "tensors")}
    for name, value in (
        ("model.generator.main.0.weight", torch.zeros(3)),
        ("optimizer.generator.0.exp_avg", torch.zeros(3)),
        ("optimizer.generator.77.exp_avg", torch.zeros(3)),
        ("rng.noise", torch.zeros(3)),
    ):
        save_checkpoint(tmp_path, 7, tensors(run.folder) | {name: value}, entry)
        with pytest.raises(CheckpointError, match="checkpoint"):
            train(TINY, tmp_path, resume=True)


def test_load_model_draws_the_same_images_as_the_run(run):
    model = load_model(run.folder)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    images = sample(model, 5, seed=3)
    assert torch.equal(images, sample(load_model(run.folder), 5, seed=3))
    assert not torch.equal(images, sample(model, 5, seed=4))
    for n, seed in ((0, 0), (-1, 0), (10_000_000, 0), (1, -1)):
        with pytest.raises(UsageError, match="must be"):
            sample(model, n, seed)


def test_saves_the_official_checkpoint_layout(run, tmp_path):
    state = tensors(run.folder)
    generator = {
        name.removeprefix("ema.generator."): tensor.contiguous()
        for name, tensor in state.items()
        if name.startswith("ema.")
    }
    save_file(generator, tmp_path / "netG.safetensors")
    load_model(run.folder).generator.load_state_dict(load_file(tmp_path / "netG.safetensors"))


def test_without_matplotlib_the_plot_is_left_out(run, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / "loss.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate(folder, 10)
    assert "matplotlib is not installed" in caplog.text and not (folder / "loss.png").exists()
    assert "<h2>Losses" in (run.folder / "report.html").read_text()
    assert "<h2>Losses" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("losses", ['"d"', '{"d": "1"}', '{"d": {}}', '{"d": NaN}', "{}}", "1" * 5000])
def test_a_damaged_line_of_metrics_is_left_out(tmp_path, losses):
    good = '{"step": 1, "losses": {"$\\\\frac$": 0.5}}\n'
    (tmp_path / "metrics.jsonl").write_text(good + f'{{"step": 2, "losses": {losses}}}\n\0\n[]\n' + good)
    assert len(read_metrics(tmp_path)) == 2
    plot = plot_losses(read_metrics(tmp_path))
    assert plot.png.startswith(b"\x89PNG") and "$\\frac$" in plot.svg
