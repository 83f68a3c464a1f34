"""The commands that use a trained model."""

import pytest
from PIL import Image

pytest.importorskip("sklearn")

from fastgen.cli import main


@pytest.fixture
def pictures(tmp_path):
    """Two colour pictures of different sizes, and a grey one in its own folder."""
    for folder, mode, names in (("colour", "RGB", "ab"), ("grey", "L", "c")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.linear_gradient("L").resize((40, 20)).convert(mode).save(tmp_path / folder / f"{name}.png")
    Image.new("L", (8, 8), 255).resize((16, 16)).save(tmp_path / "mask.png")
    return tmp_path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_the_tasks_of_a_vae(trained, pictures, capsys, fails):
    out = pictures / "out"
    mask = pictures / "half.png"
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 16, 8))
    half.save(mask)
    for command, *options in (
        ["reconstruct"], ["denoise", "--std", 0.3, "--steps", 2], ["inpaint", "--mask", mask, "--steps", 2],
        ["upscale", "--factor", 2, "--steps", 2],
    ):  # fmt: skip
        assert run(command, trained("vae"), pictures / "colour", "--out", out / command, *options) == 0
        for name in ("a.png", "b.png"):
            with Image.open(out / command / name) as picture:
                assert picture.size == (16, 16) and picture.mode == "L"
        assert f"2 pictures in {out / command}" in capsys.readouterr().out
    with Image.open(out / "inpaint" / "a.png") as filled, Image.open(pictures / "colour" / "a.png") as true:
        expected = true.convert("L").resize((16, 16), Image.Resampling.BICUBIC, box=(10, 0, 30, 20))
        assert filled.crop((0, 8, 16, 16)).tobytes() == expected.crop((0, 8, 16, 16)).tobytes()
    arguments = (trained("vae"), pictures / "colour", "--out", out / "x")
    assert "mask must leave at least one pixel" in fails(2, "inpaint", *arguments, "--mask", pictures / "mask.png")
    assert "factor must be 2 or more and divide" in fails(2, "upscale", *arguments, "--factor", 3)
    assert "holds a CGAN, but this needs a VAE" in fails(2, "denoise", trained("cgan"), pictures, "--out", out / "x")
    assert "does not exist" in fails(1, "reconstruct", trained("vae"), pictures / "none", "--out", out / "x")


def test_translate_takes_any_size(trained, pictures, fails):
    out = pictures / "out"
    for folder in ("colour", "grey"):
        arguments = (pictures / folder, "--out", out, "--direction", "b_to_a", "--tile", 16, "--overlap", 8)
        assert run("translate", trained("cyclegan"), *arguments) == 0
    for name in "abc":
        with Image.open(out / f"{name}.png") as picture:
            assert picture.size == (40, 20) and picture.mode == "RGB"
    assert "needs a CycleGAN" in fails(2, "translate", trained("vae"), pictures / "grey", "--out", out)
    assert "give it images with `fastgen translate`" in fails(2, "generate", trained("cyclegan"))


def test_generate_with_conditions_and_interpolation(trained, tmp_path, fails):
    grid, strip, animation = (tmp_path / name for name in ("a.png", "b.png", "c.gif"))
    assert run("generate", trained("cgan"), "--class", 3, "--n", 4, "--out", grid) == 0
    assert run("generate", trained("text2image"), "--text", "a handwritten seven", "--n", 4, "--out", grid) == 0
    assert run("generate", trained("vae"), "--interpolate", 2, "--n", 5, "--out", strip) == 0
    with Image.open(strip) as picture:
        assert picture.size == (5 * 18 + 2, 20)
    text = ("--text", "a handwritten seven", "--interpolate", 3, "--n", 6)
    assert run("generate", trained("text2image"), *text, "--out", animation) == 0
    with Image.open(animation) as moving:
        assert moving.n_frames == 6 and moving.size == (32, 32)
    for system, options, message in (
        ("vae", ("--class", 1), "a class was given, but this VAE draws without classes"),
        ("cgan", ("--text", "one"), "a text was given, but this CGAN"),
        ("cgan", ("--class", 10), "the class must be between 0 and 9, not 10"),
        ("cgan", ("--interpolate", 2), "say which class or text"),
        ("text2image", (), "captions must say what to draw"),
        ("vae", ("--interpolate", 1), "points at least 2"),
    ):
        assert message in fails(2, "generate", trained(system), *options, "--out", grid)


def test_a_generator_with_classes_and_a_decoder_become_plans(trained, tmp_path, capsys, fails):
    for name in ("cgan", "vae"):
        plan, out = tmp_path / f"{name}.fgplan", tmp_path / f"{name}.png"
        assert run("export", trained(name), "--plan", plan) == 0
        assert run("generate", plan, "--n", 12, "--out", out) == 0
        assert run("bench", "latency", plan, "--seconds", 0.01) == 0
    plan, out = tmp_path / "cgan.fgplan", tmp_path / "one.png"
    pictures = []
    for label in (3, 3, 8):
        assert run("generate", plan, "--n", 2, "--class", label, "--out", out) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    capsys.readouterr()
    assert "between 0 and 9, not 10" in fails(2, "generate", plan, "--class", 10, "--out", out)
    assert "--text" in fails(2, "generate", plan, "--text", "a", "--out", out)
    assert "does not draw from noise" in fails(2, "export", trained("cyclegan"), "--plan", plan)
    assert "draws with captions" in fails(2, "export", trained("text2image"), "--plan", plan)
