"""Neither process-wide settings nor changes of the data folder alter what a run learns."""

import dataclasses
import functools

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("sklearn")

from fastgen.errors import DataError
from fastgen.metrics import train_classifier
from fastgen.training import CONFIGS, evaluate, evaluation, load_model, sample, train
from fastgen.training.checkpoint import load_meta
from tests.support.tolerance import FLOAT32, units

GAN = {"batch_size": 2, "nz": 4, "steps": 1}
DCGAN = {**GAN, "ngf": 2, "ndf": 2}
RUNS = {
    "gan": {**GAN, "width": 4, "image_size": 8, "augment": "color,translation,cutout", "gradient_penalty": 1.0},
    "cgan": {**DCGAN, "embedding": 2, "precision": "bf16"},
    "text2image": {**DCGAN, "text_width": 4, "text_layers": 1, "caption_width": 2},
    "vae": {"batch_size": 2, "image_size": 8, "nz": 2, "width": 2, "steps": 1},
    "cyclegan": {"batch_size": 1, "image_size": 16, "ngf": 2, "ndf": 2, "pool_size": 1, "unet_depth": 2, "steps": 2},
}


@pytest.fixture(autouse=True)
def nothing_follows(monkeypatch):
    monkeypatch.setattr("fastgen.training.run.finish_run", lambda *arguments: None)
    monkeypatch.setattr(evaluation, "train_classifier", functools.partial(train_classifier, steps=1))


def state(folder):
    return load_file(folder / load_meta(folder)["tensors"]["file"])


TRAINED = units(torch.float32, 1024, 16)  # one or two steps of Adam; PyTorch's Transformer rounds differently


@pytest.mark.parametrize("system", RUNS)
def test_process_wide_settings_change_no_run(system, tmp_path):
    config = CONFIGS[system](**RUNS[system])

    def draw(folder):
        model = load_model(folder)
        options = {"captions": "seven"} if system == "text2image" else {}
        return model.a_to_b.model if system == "cyclegan" else sample(model, 3, 1, **options)

    train(config, tmp_path / "plain")
    expected, drawn = state(tmp_path / "plain"), draw(tmp_path / "plain")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            train(config, tmp_path / "other")
        again = draw(tmp_path / "other")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    found = state(tmp_path / "other")
    for name, value in expected.items():  # PyTorch's Transformer rounds differently if a default device is set
        torch.testing.assert_close(found[name], value, **TRAINED)
    assert system == "cyclegan" or torch.allclose(drawn, again, **FLOAT32)


@pytest.fixture
def classes(tmp_path):
    """A folder with the classes a and b, in both the training part and the held-out part."""
    for part, count in (("train", 12), ("test", 10)):
        for name, level in (("a", 0), ("b", 200)):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (32, 32), level + number).save(tmp_path / "data" / part / name / f"{number}.png")
    return tmp_path / "data"


def test_a_run_keeps_its_classes(classes, tmp_path):
    config = CONFIGS["cgan"](**DCGAN | {"data": str(classes), "embedding": 2})
    run = train(config, tmp_path / "run").folder
    assert load_meta(run)["model"]["class_names"] == ["a", "b"]
    more = dataclasses.replace(config, steps=2)
    for part in ("train", "test"):
        (classes / part / "a").rename(classes / part / "c")
    with pytest.raises(DataError, match=r"the classes of .*data are not those that the model learned: a, c changed"):
        train(more, run, resume=True)
    with pytest.raises(DataError, match="not those that the model learned"):
        evaluate(run, 10)
    for part in ("train", "test"):
        (classes / part / "c").rename(classes / part / "a")
    assert train(more, run, resume=True).step == 2


def test_a_wrong_held_out_part_is_not_replaced_by_half_of_the_training_part(classes, tmp_path, caplog):
    config = CONFIGS["gan"](**GAN | {"data": str(classes), "width": 4, "image_size": 8})
    run = train(config, tmp_path / "run").folder
    (classes / "test" / "a").rename(classes / "test" / "other")
    with pytest.raises(DataError, match=r"test has a class 'other', but .*train does not"):
        evaluate(run, 10)


def test_words_that_change_are_named(classes, tmp_path):
    folder = classes / "train" / "a"
    captions = folder / "metadata.jsonl"
    captions.write_text("".join(f'{{"file_name": "{at}.png", "text": "a door"}}\n' for at in range(4)))
    config = CONFIGS["text2image"](**RUNS["text2image"] | {"data": str(folder)})
    run = train(config, tmp_path / "run").folder
    captions.write_text(captions.read_text().replace("door", "gate"))
    with pytest.raises(DataError, match="is not what the run learned from: vocabulary of its model would change"):
        train(dataclasses.replace(config, steps=2), run, resume=True)
