import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("sklearn")

import torch

from fastgen._build import native
from fastgen.cli import main

TINY = ["--batch-size", "4", "--nz", "4", "--ngf", "2", "--ndf", "2", "--log-every", "2", "--save-every", "3"]


@pytest.fixture
def run(trained):
    return trained("dcgan")


def test_train_prints_where_its_files_are(tmp_path, capsys):
    assert main(["train", "dcgan", "--steps", "2", "--out", str(tmp_path / "a"), *TINY]) == 0
    output = capsys.readouterr().out
    assert "images/s" in output and "recognised" in output and "real images: 94" in output
    assert "conv_transpose2d_norm_act ran on " in output
    for name in ("samples.png", "loss.png", "metrics.jsonl", "checkpoint.json", "evaluation.json"):
        assert str(tmp_path / "a" / name) in output and (tmp_path / "a" / name).exists()


def test_generate_same_seed_same_picture(run, tmp_path, capsys):
    pictures = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert (
            main(["generate", str(run), "--n", "9", "--seed", str(seed), "--out", str(tmp_path / f"{name}.png")]) == 0
        )
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert f"9 images in {tmp_path / 'c.png'}" in capsys.readouterr().out


def test_evaluate_and_info(run, capsys):
    assert main(["evaluate", str(run), "--n", "20"]) == 0
    assert "of 20 samples" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "conv_transpose2d_norm_act" in capsys.readouterr().out


@pytest.mark.parametrize("options", ([], ["--dtype", "bf16", "--no-channels-last", "--no-training", "--device", "cpu"]))
def test_tune_a_run(run, tmp_path, capsys, monkeypatch, options, fused_when_small):
    assert native.load() is None  # from the real cache
    monkeypatch.setenv("FASTGEN_CACHE_DIR", str(tmp_path))
    assert main(["tune", str(run), "--batch", "2", *options]) == 0
    output = capsys.readouterr()
    (file,) = (tmp_path / "choices").iterdir()
    assert "generator, batch 2, " in output.out and "discriminator, batch 2, " in output.out and str(file) in output.out
    assert output.err.startswith("1 of ") and ("weight_grad" in output.err) == (not options)


def test_tune_names_what_it_does_not_know(run, fails):
    assert "batch must be between 1 and 65536, not 0" in fails(2, "tune", run, "--batch", 0)
    assert "unknown model 'dcgn': did you mean dcgan" in fails(2, "tune", "dcgn")
    assert "seconds must be positive" in fails(2, "tune", "lsgan", "--batch", 1, "--seconds", 0)


def test_info_refuses_the_options_of_explain_alone(fails):
    for option in (["--batch", 4], ["--dtype", "bf16"], ["--no-channels-last"], ["--device", "cpu"], ["--no-training"]):
        assert f"{option[0]} belongs to --explain" in fails(2, "info", *option)


def test_resume_takes_the_stored_settings(run, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "dcgan", "--steps", "2", "--seed", "3", "--out", str(folder), *TINY]) == 0
    assert main(["train", "dcgan", "--out", str(folder), "--resume", "--steps", "3"]) == 0
    assert "to step 3" in capsys.readouterr().out
    assert '"seed": 3' in (folder / "config.json").read_text()


def test_misuse_is_one_line_and_exit_code_2(run, tmp_path, fails):
    assert "did you mean train" in fails(2, "trian")
    assert "unknown model 'dcgn': did you mean dcgan" in fails(2, "train", "dcgn", "--out", tmp_path / "a")
    assert "steps must be between 1 and 1000000000, not 0" in fails(
        2, "train", "dcgan", "--steps", 0, "--out", tmp_path / "a"
    )
    line = fails(2, "train", "dcgan", "--data", "digts", "--out", tmp_path / "a")
    assert "unknown data set 'digts': did you mean digits" in line
    for n in (0, -1, 10_000_000):
        assert f"n must be between 1 and 262144 for images of this size, not {n}" in fails(2, "generate", run, "--n", n)
    assert "image format" in fails(2, "generate", run, "--out", tmp_path / "a.abc")
    assert "nz of a run cannot change" in fails(2, "train", "dcgan", "--resume", "--nz", 9, "--out", run)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "train",
        "train dcgan",
        "train dcgan --out x --steps no",
        "generate",
        "info 3",
    ],
)
def test_bad_syntax_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_failure_is_one_line_and_exit_code_1(run, tmp_path, monkeypatch, fails):
    assert "holds no checkpoint" in fails(1, "generate", tmp_path)
    assert "already holds a run" in fails(1, "train", "dcgan", "--out", run)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fails(1, "train", "dcgan", "--out", tmp_path / "file" / "run")
    assert "Is a directory" in fails(1, "generate", run, "--out", (tmp_path / "d.png").mkdir() or tmp_path / "d.png")
    monkeypatch.setenv("FASTGEN_DEBUG", "1")
    with pytest.raises(RuntimeError, match="already holds a run"):
        main(["train", "dcgan", "--out", str(run)])


def test_an_implementation_that_cannot_run_is_exit_code_1(run, monkeypatch, fails):
    monkeypatch.setenv("FASTGEN_IMPL", "cuda")
    assert "FASTGEN_IMPL='cuda' cannot run" in fails(1, "generate", run)


def test_out_of_memory_is_exit_code_1(run, monkeypatch, fails):
    def allocate(*arguments):
        return torch.empty(2**60)

    monkeypatch.setattr("fastgen.training.run.sample", allocate)
    assert "not enough memory" in fails(1, "generate", run)
    monkeypatch.setattr("fastgen.training.run.sample", lambda *arguments: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["generate", str(run)])  # a bug in fastgen shows its whole traceback


def test_ctrl_c_leaves_a_checkpoint_and_130(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fastgen", "train", "dcgan", "--out", str(folder), "--steps", "100000", *TINY]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"continue with: fastgen train dcgan --out {folder} --resume" in errors and "Traceback" not in errors
    assert main(["generate", str(folder), "--n", "4", "--out", str(tmp_path / "grid.png")]) == 0


def test_help_is_quick_and_needs_no_torch():
    script = (
        "import sys\nfrom fastgen.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["train", "dcgan", "--help"],
        ["generate", "--help"],
        ["--version"],
    ):
        result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "fastgen" in result.stdout


def test_export_then_generate_and_measure_without_torch(run, tmp_path, capsys, fails):
    plan = tmp_path / "g.fgplan"
    assert main(["export", str(run), "--plan", str(plan)]) == 0
    assert f"{plan}: " in capsys.readouterr().out
    code = "import sys; from fastgen.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        picture = str(tmp_path / f"{name}.png")
        arguments = ["generate", str(plan), "--n", "9", "--seed", seed, "--out", picture]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "latency", str(plan), "--seconds", "0.1", "--batch", "2"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "batch 2, " in done.stdout and "p50 " in done.stdout and "p99 " in done.stdout
    assert "between 1 and" in fails(2, "generate", plan, "--n", "0", "--out", tmp_path / "d.png")
    assert "draws without classes" in fails(2, "generate", plan, "--class", "1", "--out", tmp_path / "d.png")
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "cut short" in fails(1, "bench", "latency", plan)
