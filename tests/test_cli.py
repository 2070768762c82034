"""The command line, as a newcomer would use and misuse it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import scoremachine as sm
from conftest import random_corpus
from scoremachine.app import cli
from scoremachine.app.runs.generation import Run, RunOptions


def run(*words, **options):
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "scoremachine", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


@pytest.fixture
def inside(monkeypatch, capsys):
    """Runs the command in this process: quicker, and the same `main`."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["scoremachine", *map(str, words)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            cli.main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, ended.value.code, said.out, said.err)

    return call


def generate(call, out, *words):
    return call(
        "generate", "--data", "digits", "--limit", 60, "--machine", "ls", "--patch-size", 3,
        "--count", 3, "--steps", 4, "--out", out, *words,
    )  # fmt: skip


def test_version_and_help_import_nothing_heavy():
    code = (
        "import sys\nfrom scoremachine.app.cli import main\n"
        "sys.argv = ['scoremachine', '--version']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numba', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"scoremachine {sm.__version__}", "[]"]
    assert "generate" in run("--help").stdout


def test_generate_writes_what_the_library_makes(tmp_path):
    done = generate(run, tmp_path / "run", "--trajectory")
    assert done.returncode == 0, done.stderr
    corpus = sm.Corpus.open("digits", limit=60)
    x = sm.generate(sm.build("ls", corpus, patch_size=3), count=3, steps=4, seed=0)
    saved = np.load(tmp_path / "run" / "samples.npz")
    assert np.array_equal(saved["x"], x.numpy())
    assert saved["images"].dtype == np.uint8
    assert np.array_equal(saved["images"], np.rint(np.clip((saved["x"] + 1) * 127.5, 0, 255)))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["machine"] == "ls"
    assert record["settings"]["seed"] == 0
    assert record["seconds"] > 0
    assert set(record["versions"]) >= {"scoremachine", "torch", "azula"}
    with Image.open(tmp_path / "run" / "trajectory.gif") as film:
        assert film.n_frames == 4
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"samples.npz", "samples.png", "run.json", "trajectory.gif"}


def test_class_takes_a_name_and_leaves_the_others_out(inside, tmp_path):
    done = generate(inside, tmp_path, "--class", "3")
    assert done.returncode == 0, done.stderr
    corpus = sm.Corpus.open("digits", limit=60)
    machine = sm.build("ls", corpus, patch_size=3)
    x = sm.generate(machine, count=3, steps=4, seed=0, label=3)
    assert np.array_equal(np.load(tmp_path / "samples.npz")["x"], x.numpy())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "digit"], "did you mean 'digits'"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--machine", "lss"], "did you mean 'ls'"),
        (["--patch-size", "4"], "patch_size 4 is even"),
        (["--patch-size", "9"], "larger than the 8 x 8"),
        (["--patch-size", "pspc"], "pspc-cifar10"),
        (["--patch-size", "3.5"], "patch_size is 3.5; expected a positive whole number"),
        (["--patch-size", "tiny"], "or give a number, auto, or the calibration.json"),
        (["--patch-size", "no.json"], "there is no no.json; expected the calibration.json"),
        (["--data", ""], "the name of the images is empty"),
        (["--data", "hf:"], "hf: names no data set"),
        (["--schedule", "linear"], "no schedule is called 'linear'"),
        (["--schedule", "edm:1,8"], "schedule is 'edm:1,8'; expected"),
        (["--sampler", "dpm"], "no sampler is called 'dpm'"),
        (["--count", "0"], "count is 0"),
        (["--steps", "-1"], "steps is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--bandwidth", "wide"], "bandwidth is 'wide'"),
        (["--class", "cat"], "cat"),
        (["--boundary", "circular"], "no setting 'boundary'"),
        (["--limit", "0"], "limit"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(inside, tmp_path, words, says):
    done = generate(inside, tmp_path / "out", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_an_empty_folder_is_exit_code_2(inside, tmp_path):
    done = generate(inside, tmp_path / "out", "--data", tmp_path)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_exit_code_2_before_any_work(inside, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = generate(inside, tmp_path / "file" / "out")
    assert done.returncode == 2
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    """The write fails in the middle: the old file stays, nothing else does."""
    from scoremachine.runtime.files import written

    target = tmp_path / "samples.npz"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="is full or your quota"), written(target) as temporary:  # noqa: PT012
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        with open(temporary, "wb", buffering=0) as f:
            f.write(b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def started(command):
    """A process that hears Ctrl-C, even where the tests themselves were started not to."""
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def long_run(out, *words):
    return [
        sys.executable, "-m", "scoremachine", "generate", "--data", str(out.parent / "images.npy"),
        "--machine", "els", "--patch-size", "5", "--count", "16", "--steps", "20", "--batch", "1",
        "--out", str(out), *words,
    ]  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, how):
    corpus = random_corpus(N=300, H=8, W=8)
    np.save(tmp_path / "images.npy", corpus.images)
    out = tmp_path / "run"
    process = started(long_run(out))
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob(".unfinished/[0-9]*.npz"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert not (out / "samples.npz").exists()
    assert not (out / "run.json").exists()
    kept = sorted(out.glob(".unfinished/[0-9]*.npz"))
    assert 3 <= len(kept) < 16
    for path in kept:
        assert np.isfinite(np.load(path)["x"]).all()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume" in err
        other = subprocess.run(
            [*long_run(out, "--resume"), "--seed", "1"], capture_output=True, text=True
        )
        assert other.returncode == 2
        assert "another seed" in other.stderr
    done = subprocess.run(long_run(out, "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"after {len(kept)} finished" in done.stderr
    assert not (out / ".unfinished").exists()
    whole = sm.generate(sm.build("els", corpus, patch_size=5), count=16, steps=20, batch=16)
    assert np.array_equal(np.load(out / "samples.npz")["x"], whole.numpy())
    if how == signal.SIGINT:
        again = subprocess.run(long_run(out, "--resume"), capture_output=True, text=True)
        assert again.returncode == 0
        assert "complete" in again.stderr


def test_what_a_killed_run_was_writing_is_not_a_finished_picture(tmp_path):
    machine = sm.build("ideal", sm.Corpus.open("digits", limit=20))
    killed = Run(tmp_path, machine, RunOptions(count=4, steps=2, batch=1))
    killed.unfinished.mkdir()
    (killed.unfinished / "000000.npz").write_bytes(b"whole")
    (killed.unfinished / ".000001-half.npz").write_bytes(b"")
    assert killed.finished() == 1


def test_denoise_takes_arrays_as_they_are_and_adds_noise_to_pictures(inside, tmp_path):
    corpus = sm.Corpus.open("digits", limit=60)
    machine = sm.build("ls", corpus, patch_size=3)
    y = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "y.npy", y.numpy())
    shared = ["--data", "digits", "--limit", 60, "--patch-size", 3, "--sigma", 0.7]
    done = inside("denoise", tmp_path / "y.npy", *shared, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    D = np.load(tmp_path / "a" / "denoised.npz")["D"]
    assert np.array_equal(D, machine.denoise(y[None], 0.7).numpy())
    Image.fromarray(corpus.images[5, 0]).save(tmp_path / "x.png")
    x = corpus.images[5].astype(np.float32) / 127.5 - 1
    for words, noise in ((["--noisy"], 0), ([], 0.7)):
        done = inside("denoise", tmp_path / "x.png", *shared, *words, "--out", tmp_path / "b")
        assert done.returncode == 0, done.stderr
        got = np.load(tmp_path / "b" / "denoised.npz")["y"][0]
        if noise == 0:
            assert np.array_equal(got, x)
        else:
            assert 0.5 < (got - x).std() < 0.9


def test_denoise_takes_a_built_in_picture_and_says_when_a_path_has_its_name(
    inside, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["--data", "texture/brick", "--size", 8, "--machine", "ideal", "--sigma", 1]
    for name in ("photo/chelsea", "built-in:photo/chelsea"):
        done = inside("denoise", name, *words, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert np.load(tmp_path / "out" / "denoised.npz")["y"].shape == (1, 1, 8, 8)
    (tmp_path / "photo" / "chelsea").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "photo" / "chelsea" / "0.png")
    done = inside("denoise", "photo/chelsea", *words, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "built-in:photo/chelsea" in done.stderr
    done = inside("denoise", "./photo/chelsea", *words, "--noisy", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (np.load(tmp_path / "out" / "denoised.npz")["y"] == -1).all()


def test_data_may_name_a_split_or_an_array_in_every_command(inside, tmp_path):
    u = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=u[:5], x_test=u[5:], masks=u)
    settings = ["--machine", "ideal", "--count", 1, "--steps", 2]
    for words, said in (
        ([], "train is opened"),
        (["--split", "test"], ""),
        (["--array", "masks"], ""),
        (["--split", "extra"], "no split 'extra'"),
        (["--array", "mask"], "did you mean 'masks'"),
    ):
        out = tmp_path / "-".join(["run", *words])
        done = inside("generate", "--data", tmp_path / "set.npz", *settings, "--out", out, *words)
        assert done.returncode == (2 if words and said else 0), done.stderr
        assert said in done.stderr


@pytest.mark.parametrize("panel", cli.COMMANDS)
def test_every_command_that_opens_data_takes_a_split_and_an_array(panel):
    import inspect

    for command in cli.COMMANDS[panel]:
        names = inspect.signature(command).parameters
        assert "data" not in names or {"split", "array"} <= set(names), command


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((1, 8, 8), dtype=np.uint8), "expected floats"),
        (np.zeros((8, 8)), "expected floats"),
        (np.zeros((1, 9, 9)), r"expected (B, 1, 8, 8)"),
        (np.full((1, 8, 8), np.nan), "NaN"),
        (np.array({"a": 1}), "no plain array"),
    ],
)
def test_denoise_refuses_other_arrays(inside, tmp_path, array, says):
    np.save(tmp_path / "y.npy", array)
    done = inside(
        "denoise", tmp_path / "y.npy", "--sigma", 1, "--data", "digits", "--patch-size", 3,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_calibrate_prints_its_table_and_draws_its_curves(tmp_path):
    done = run(
        "calibrate", "--data", "digits", "--limit", 200, "--held-out", 4, "--steps", 3,
        "--reference", "kamb-mnist-resnet", "--out", tmp_path, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kamb-mnist-resnet" in done.stdout
    assert done.stdout.count("±") == 6
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert len(found["chosen"]) == 3
    with Image.open(tmp_path / "calibration.png") as picture:
        assert picture.width > 1000
    machine = sm.build("ls", random_corpus(H=8, W=8), patch_size=str(tmp_path / "calibration.json"))
    assert [machine.patch_size(sigma) for sigma in found["sigmas"]] == found["chosen"]


def test_quiet_is_quiet(inside, tmp_path):
    done = inside(
        "generate", "--data", "digits", "--limit", 50, "--machine", "ls", "--count", 2,
        "--steps", 3, "--out", tmp_path, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""


def test_zoo_draws_every_machine_and_goes_on(inside, tmp_path):
    words = "zoo", "--data", "digits", "--limit", 40, "--count", 2, "--steps", 2, "--out", tmp_path
    done = inside(*words, "--machines", "ideal,ls,els,cfdm")
    assert done.returncode == 0, done.stderr
    assert "4 machines in" in done.stdout
    assert Image.open(tmp_path / "zoo.png").size[0] > 100
    for name in ("ideal", "ls", "els", "smoothed"):
        with np.load(tmp_path / name / "samples.npz") as file:
            assert file["images"].shape == (2, 1, 8, 8)
    before = (tmp_path / "ls" / "samples.npz").stat().st_mtime_ns
    again = inside(*words, "--machines", "ideal,ls,pca", "--resume")
    assert again.returncode == 0
    assert (tmp_path / "ls" / "samples.npz").stat().st_mtime_ns == before
    assert (tmp_path / "pca" / "run.json").exists()


def test_denoising_error_writes_table_csv_and_plot(inside, tmp_path):
    done = inside(
        "denoising-error", "--data", "digits", "--limit", 60, "--steps", 2, "--validation", 2,
        "--test", 4, "--machines", "ideal,pspc", "--published", "pspc=3", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pspc (published: 3)" in done.stdout
    lines = (tmp_path / "denoising-error.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 5
    assert lines[0].startswith("machine,choice,images,held_out,sigma,")
    assert all(line.count(",") == lines[0].count(",") for line in lines)
    assert Image.open(tmp_path / "denoising-error.png").size[0] > 500
    report = (tmp_path / "denoising-error.md").read_text()
    assert report.count("| `pspc`, published: 3 | 3 | 3 |") == 1  # in what was chosen
    least = min(float(line.split(",")[7]) for line in lines[1:] if line.split(",")[4] == "0.002")
    assert f"**{least:.2g}**".replace("e-0", "e-") in report


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--machine", "pca", "--set", "threshold=0.1"], None),
        (["--machine", "smoothed", "--set", "M=2", "--set", "delta=0.5", "--start", "0.5"], None),
        (["--machine", "pspc-flex", "--set", "share=pspc-flex-cifar10"], None),
        (["--machine", "es"], None),
        (["--patch-size", 3, "--window", "gaussian", "--augment", "flips,shifts=1"], None),
        (["--set", "share=0.5"], "has no setting 'share'"),
        (["--set", "share"], "names no value; expected NAME=VALUE"),
        (["--machine", "pca", "--set", "threshold=7"], "threshold is 7"),
        (["--start", "1"], "start is 1.0; expected a time"),
        (["--augment", "turns"], "no augmentation is called 'turns'"),
        (["--machine", "composite", "--set", "of=gaussian,lss"], "did you mean 'ls'"),
        (["--patch-size", 3, "--process", "heat"], None),
        (["--process", "blur"], "no process is called 'blur'; there are ordinary, heat, pyramid"),
        (["--process", "heat", "--bandwidth", 0.1], "bandwidth is 0.1"),
        (["--machine", "els", "--patch-size", 3, "--size", "9x12"], None),
        (["--size", "9x12"], "use els or epc, or open the corpus with size="),
        (["--size", "9x"], "expected the images' side, as 32"),
        (["--machine", "composite", "--set", "of=ideal", "--set", "weights=1,2"], "2 weights"),
        (["--machine", "composite", "--set", "of=ideal", "--set", "weights=1"], None),
    ],
)
def test_settings_of_the_machines_are_taken_and_refused(inside, tmp_path, words, says):
    done = inside(
        "generate", "--data", "digits", "--limit", 60, "--machine", "ls", "--count", 1,
        "--steps", 2, "--out", tmp_path, *words,
    )  # fmt: skip
    if says is None:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "samples.png").exists()
    else:
        assert done.returncode == 2
        assert says in done.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("zoo", ["--machines", "ls,lss"], "did you mean 'ls'"),
        ("zoo", ["--machine", "ls,lss"], "did you mean 'ls'"),
        ("quality", ["--machine", ""], "nothing to evaluate"),
        ("quality", ["--machine", "ls", "--out", "x" * 300], "cannot be made: file name too long"),
        ("compress", ["--sizes", "1B"], "no size is left to measure: one cluster takes"),
        ("zoo", ["--schedule", "edmm"], "no schedule is called"),
        ("zoo", ["--count", 0], "count is 0"),
        ("denoising-error", ["--validation", 0], "validation is 0"),
        ("denoising-error", ["--published", "pspc"], "expected NAME=VALUE"),
        ("denoising-error", ["--steps", 0], "steps is 0"),
    ],
)
def test_zoo_and_denoising_error_refuse_senseless_words(inside, tmp_path, command, words, says):
    done = inside(command, "--data", "digits", "--limit", 30, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert says in done.stderr


def teach(call, out, *words):
    return call(
        "train", "--data", "digits", "--limit", 60, "--steps", 5, "--set", "width=8", "--set",
        "depth=1", "--precision", "float32", "--out", out, *words,
    )  # fmt: skip


def against(call, out, network, *words):
    return call(
        "compare", "--network", network, "--data", "digits", "--limit", 60, "--machine",
        "gaussian,ls:3", "--pictures", 3, "--count", 2, "--steps", 3, "--out", out, *words,
    )  # fmt: skip


def test_a_network_is_trained_and_compared(inside, tmp_path):
    done = teach(inside, tmp_path / "network")
    assert done.returncode == 0, done.stderr
    assert "5 steps of 64 pictures" in done.stdout
    done = against(inside, tmp_path / "out", tmp_path / "network", "--report")
    assert done.returncode == 0, done.stderr
    assert "ls:3" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "compare.csv", "compare.md", "compare.json", "compare.png", "samples.png", "trajectory.png",
        "report.html",
    }  # fmt: skip
    settings = json.loads((tmp_path / "out" / "compare.json").read_text())["settings"]
    card = json.loads((tmp_path / "network" / "network.json").read_text())
    assert settings["held_out"] == card["training"]["held_out"][:3]
    for name in ("compare.png", "samples.png", "trajectory.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 100


def test_an_interrupted_training_is_resumed(inside, tmp_path):
    words = [
        "train", "--data", "digits", "--limit", "60", "--set", "width=8", "--set", "depth=1",
        "--precision", "float32", "--out", str(tmp_path / "n"),
    ]  # fmt: skip
    eager = (
        "import sys; from scoremachine.app import cli; "
        "from scoremachine.lab.networks import training; "
        "training.EVERY = 0.0; sys.argv[0] = 'scoremachine'; cli.main()"
    )  # keeps a checkpoint of every step
    process = started([sys.executable, "-c", eager, *words, "--budget", "1h"])
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "n" / "training.safetensors").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume" in said
    assert {p.name for p in (tmp_path / "n").iterdir()} == {"training.safetensors"}
    done = inside(*words, "--budget", "1s", "--resume")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "n" / "network.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--network", "resnett"], "did you mean 'resnet'"),
        (["--budget", "soon"], "budget is 'soon'"),
        (["--budget", "0m"], "budget is '0m'"),
        (["--steps", "0"], "steps is 0"),
        (["--set", "widht=8"], "did you mean 'width'"),
        (["--set", "name=1"], "has no setting 'name'"),
        (["--set", "out=1"], "has no setting 'out'"),
        (["--set", "width=wide"], "width is 'wide'"),
        (["--rate", "7"], "rate is 7"),
        (["--precision", "half"], "no precision is called"),
        (["--device", "tpu"], "no device is called"),
    ],
)
def test_train_refuses_senseless_words(inside, tmp_path, words, says):
    done = teach(inside, tmp_path / "network", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "network").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--network", "nowhere"], "nowhere"),
        (["--machine", "lss"], "did you mean 'ls'"),
        (["--machine", "ls:4"], "even"),
        (["--machine", "ls:+h"], "says nothing after its colon"),
        (["--schedule", "linear"], "no schedule is called 'linear'"),
        (["--sampler", "dpm"], "no sampler is called 'dpm'"),
        (["--count", "0"], "count is 0"),
    ],
)
def test_compare_refuses_senseless_words(inside, tmp_path, words, says):
    teach(inside, tmp_path / "network")
    done = against(inside, tmp_path / "out", tmp_path / "network", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_sensitivity_draws_maps_and_prints_widths(inside, tmp_path):
    teach(inside, tmp_path / "network")
    words = ["--data", "digits", "--limit", 60, "--sigmas", "2,0.5", "--count", 1, "--pixels", 4]
    done = inside(
        "sensitivity", *words, "--network", tmp_path / "network", "--machine", "ls:3,gaussian",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(3)" in done.stdout
    rows = (tmp_path / "out" / "sensitivity.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 2
    with np.load(tmp_path / "out" / "sensitivity.npz") as file:
        assert file["ls:3"].shape == (2, 15, 15)
    for more, says in [
        ([], "neither a network nor a machine"),
        (["--machine", "ls:3", "--sigmas", "1,none"], "expected noise levels"),
        (["--network", tmp_path / "nowhere"], "nowhere"),
    ]:
        done = inside("sensitivity", *words, "--out", tmp_path / "none", *more)
        assert done.returncode == 2
        assert says in done.stderr
        assert not (tmp_path / "none").exists()


def test_bias_compares_networks_with_the_ideal(inside, tmp_path):
    teach(inside, tmp_path / "one")
    teach(inside, tmp_path / "two", "--seed", 1)
    words = ["--data", "digits", "--limit", 60, "--machine", "ls:3", "--sigmas", "2,0.5"]
    both = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    done = inside("bias", *words, "--networks", both, "--pictures", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "two: size" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "bias.png", "bias-pictures.png", "bias.json"
    }  # fmt: skip
    done = inside("bias", *words, "--networks", "nowhere", "--out", tmp_path / "none")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert not (tmp_path / "none").exists()


def test_study_refuses_senseless_words(inside, tmp_path):
    for words, says in [
        (["--steps", 0], "steps is 0"),
        (["--limit", 4], "at least 8"),
        (["--data", "digit"], "did you mean 'digits'"),
    ]:
        done = inside("study", "--data", "digits", "--out", tmp_path / "none", *words)
        assert done.returncode == 2
        assert says in done.stderr
        assert not (tmp_path / "none").exists()


def test_quality_judges_networks_and_machines(inside, tmp_path):
    teach(inside, tmp_path / "n")
    words = ["--data", "digits", "--limit", 60, "--networks", tmp_path / "n", "--count", 3]
    done = inside(
        "quality", *words, "--machine", "gaussian", "--steps", 3, "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert "| held-out images |" in done.stdout
    assert Image.open(tmp_path / "out" / "quality.png").size[0] > 100
    done = inside("quality", *words, "--count", 1, "--out", tmp_path / "none")
    assert done.returncode == 2
    assert "count two or more" in done.stderr
    assert not (tmp_path / "none").exists()


def test_compress_draws_its_curves_and_keeps_a_mixture(inside, tmp_path):
    done = inside(
        "compress", "--data", "digits", "--limit", 80, "--machine", "ideal", "--sizes", "20%,5",
        "--steps", 3, "--held-out", 4, "--keep", "10%", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| smallest |" in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"mixture.safetensors", "sizes.md", "sizes.json", "sizes.png"}
    done = inside(
        "generate", "--data", tmp_path / "mixture.safetensors", "--machine", "ideal",
        "--count", 1, "--steps", 2, "--out", tmp_path / "drawn",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = inside("compress", "--data", "digits", "--machine", "pspc", "--out", tmp_path)
    assert done.returncode == 2
    assert "a mixture is the source of ideal, ls and els" in done.stderr


def test_ablation_measures_sizes_of_patches_by_kind_and_resolution(inside, tmp_path):
    done = inside(
        "ablation", "--data", "digits", "--data", "texture/brick", "--sides", "8,12",
        "--limit", 40, "--machine", "ls,pspc+gaussian", "--sigmas", "1,0.3", "--held-out", 3,
        "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "ablation.md").read_text()
    assert text.count("## ") == 4
    assert "texture/brick, 12 x 12" in text
    assert "digits, upsampled from 8 x 8, 12 x 12" in text
    assert "digits, 8 x 8" in text
    assert "upsampled from 8 x 8 to 12 x 12: more pixels, and no more detail" in done.stderr
    assert {"ablation.md", "ablation.json", "ablation.png"} == {p.name for p in tmp_path.iterdir()}
    for words, says in (
        (["--machine", "pca"], "pca has no boxes to change the size of"),
        (["--sides", "8,x"], "sides are '8,x'; expected whole numbers"),
        (["--sigmas", "0"], "sigmas are '0'"),
    ):
        done = inside("ablation", "--data", "digits", "--limit", 20, "--out", tmp_path, *words)
        assert done.returncode == 2
        assert says in done.stderr


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_where_the_locale_is_ascii_results_are_written_and_printed(tmp_path):
    done = run(
        "calibrate", "--data", "digits", "--limit", 100, "--held-out", 2, "--steps", 2,
        "--out", tmp_path, "--quiet", env={**os.environ, **ASCII},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"calibration.json", "calibration.png"}
    assert "0.0" in done.stdout
    assert "±" not in done.stdout


@pytest.mark.parametrize(
    "found",
    [
        # files are there before the first word is printed, which may fail
        ["calibrate", "--machine", "ls", "--held-out", "2", "--steps", "2"],
        ["calibrate", "--machine", "composite", "--set", "of=ideal,gaussian", "--steps", "2"],
        ["denoising-error", "--machines", "gaussian", "--validation", "2", "--test", "2",
         "--steps", "2"],
        ["compress", "--machine", "ideal", "--sizes", "4", "--held-out", "2", "--steps", "2"],
        ["ablation", "--machine", "ls", "--sigmas", "1", "--held-out", "2"],
    ],
)  # fmt: skip
def test_results_are_written_before_they_are_printed(inside, tmp_path, monkeypatch, found):
    def refuse(*_, **__):
        raise ValueError("printing ended")

    monkeypatch.setattr("scoremachine.app.tables.show", refuse)
    monkeypatch.setattr("rich.console.Console.print", refuse)
    monkeypatch.setattr("scoremachine.app.runs.machines.print", refuse, raising=False)
    done = inside(*found, "--data", "digits", "--limit", 40, "--out", tmp_path)
    assert "printing ended" in done.stderr
    assert len(list(tmp_path.iterdir())) >= 2


def test_earlier_spellings_are_taken_and_not_shown(inside, tmp_path):
    assert cli.current("--everywhere=7") == "--max-images-els=7"
    assert cli.current("--count=7") == "--count=7"
    words = ["--data", "digits", "--limit", 30, "--steps", 1, "--machines", "gaussian"]
    done = inside("denoising-error", *words, "--choosing", 2, "--reporting", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("calibrate", "denoising-error", "compare"):
        text = inside(command, "--help").stdout
        assert not any(option in text for option in cli.EARLIER)
    assert "--reference" in inside("calibrate", "--help").stdout


def test_warnings_of_other_libraries_are_not_for_users(inside, tmp_path, capsys):
    show = cli._show_warning
    show("a folder was skipped", UserWarning, cli.__file__, 1)
    show(
        "The given NumPy array is not writable, ...undefined behavior", UserWarning, cli.__file__, 1
    )
    show("deprecated", DeprecationWarning, np.__file__, 1)
    assert capsys.readouterr().err == "scoremachine: a folder was skipped\n"
    images = np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for k, image in enumerate(images):  # mapped from the cache, so that they are read-only
        Image.fromarray(image).save(folder / f"{k}.png")
    done = inside(
        "compress", "--data", folder, "--machine", "ideal", "--sizes", "4", "--held-out", 2,
        "--steps", 1, "--out", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""


def test_an_index_of_patches_as_large_as_the_images_is_none(inside):
    done = inside("index", "--data", "digits", "--limit", 20, "--patch-size", 7)
    assert done.returncode == 0, done.stderr
    done = inside("index", "--data", "faces", "--limit", 20, "--patch-size", 25)
    assert done.returncode == 0, done.stderr
    assert "25 x 25: no index, as every patch is compared directly" in done.stdout


def test_a_full_disk_says_where_and_how_to_go_on(inside, tmp_path, monkeypatch):
    import errno

    from scoremachine.runtime import files

    make = files.tempfile.mkstemp

    def full(*words, **settings):
        if "samples" in settings["prefix"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(*words, **settings)

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    done = generate(inside, tmp_path / "run")
    assert done.returncode == 2
    assert f"the disk of {tmp_path / 'run'} is full or your quota is used up" in done.stderr
    assert "make room there" in done.stderr
    assert "the same command with --resume continues" in done.stderr
    assert "Errno" not in done.stderr
    monkeypatch.undo()


def test_a_heat_run_is_not_taken_for_an_ordinary_one(inside, tmp_path):
    done = generate(inside, tmp_path, "--process", "heat")
    assert done.returncode == 0, done.stderr
    done = generate(inside, tmp_path, "--resume")
    assert done.returncode == 2
    assert "another process" in done.stderr
