"""Every mistake a user can make: one sentence that names it, the right exit code, no traceback, nothing left behind."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import ROOT

DEMO = ROOT / "compressor/demo"


def images(folder: Path, count: int = 3, **changes) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((28, 28), 20 * i, np.uint8)).save(folder / f"{i}.png")
    for name, content in changes.items():
        (folder / f"{name}.png").write_bytes(content)
    return folder


def checkpoint(folder: Path, change=None, config=None) -> Path:
    """A copy of the embedded checkpoint, its tensors changed by `change` and its config updated with `config`."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir(parents=True)
    tensors = load_file(DEMO / "model.safetensors")
    save_file(change(tensors) if change else tensors, folder / "model.safetensors")
    facts = json.loads((DEMO / "config.json").read_text())
    facts["model_args"] |= (config or {}).pop("model_args", {})
    (folder / "config.json").write_text(json.dumps({**facts, **(config or {})}))
    return folder


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_tensor(name, value):
    return lambda tensors: {**tensors, name: value}


class Bomb:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return (os.system, ("touch /tmp/vitrim-was-here",))


def truncated(tmp: Path) -> Path:
    folder = checkpoint(tmp / "m")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    return folder


def pickled(tmp: Path) -> Path:
    (tmp / "m.pth").write_bytes(pickle.dumps({"w": Bomb()}))
    return tmp / "m.pth"


def recipe(tmp: Path, text: str) -> Path:
    (tmp / "r.yaml").write_text(text)
    return tmp / "r.yaml"


def npz(tmp: Path, **arrays) -> Path:
    np.savez(tmp / "d.npz", **arrays)
    return tmp / "d.npz"


def classes(tmp: Path) -> Path:
    for i in range(3):
        images(tmp / "d" / f"class{i}", 2)
    return tmp / "d"


def occupied(tmp: Path) -> Path:
    (tmp / "b").mkdir()
    (tmp / "b" / "precious").write_text("keep me")
    return tmp / "b"


def overlap(tmp: Path) -> Path:
    with np.load(DEMO / "calibration.npz") as data:
        np.savez(tmp / "e.npz", images=data["images"][:20], labels=data["labels"][:20])
    return tmp / "e.npz"


NAN = np.full(192, np.nan, np.float16)

# name: (arguments of `vitrim compress` beside --out, a part of the sentence, exit code)
COMPRESS = {
    "missing folder": (lambda t: [t / "nowhere"], "nowhere", 2),
    "empty folder": (lambda t: [(t / "m").mkdir() or t / "m"], "config.json", 2),
    "config without weights": (
        lambda t: [shutil.copytree(DEMO, t / "m", ignore=lambda *_: ["model.safetensors"])],
        "safetensors",
        2,
    ),
    "config is not JSON": (
        lambda t: [(checkpoint(t / "m") / "config.json").write_text("{") and t / "m"],
        "config.json",
        2,
    ),
    "truncated safetensors": (lambda t: [truncated(t)], "model.safetensors", 2),
    "pickle with code": (lambda t: [pickled(t), "--arch", "vit_tiny_patch16_224"], "m.pth", 2),
    "bare weights without --arch": (lambda t: [DEMO / "model.safetensors"], "--arch", 2),
    "unknown architecture": (lambda t: [checkpoint(t / "m", config={"architecture": "resnet50"})], "resnet50", 2),
    "NaN weights": (lambda t: [checkpoint(t / "m", with_tensor("norm.weight", NAN))], "finite", 2),
    "missing tensor": (lambda t: [checkpoint(t / "m", without("blocks.3.attn.proj.weight"))], "blocks.3", 2),
    "unknown tensor": (
        lambda t: [checkpoint(t / "m", with_tensor("layers.0.downsample.norm.weight", NAN * 0))],
        "downsample",
        2,
    ),
    "wrong shape": (lambda t: [checkpoint(t / "m", with_tensor("blocks.0.mlp.fc1.bias", NAN[:7]))], "fc1", 2),
    "heads do not divide": (lambda t: [checkpoint(t / "m", config={"model_args": {"num_heads": 5}})], "5", 2),
    "image size of no patch": (lambda t: ["demo", "--image-size", 2], "2", 2),
    "no images": (lambda t: ["demo", "--data", (t / "d").mkdir() or t / "d"], "image", 2),
    "missing data": (lambda t: ["demo", "--data", t / "nowhere"], "nowhere", 2),
    "corrupt image": (lambda t: ["demo", "--data", images(t / "d", bad=b"\x89PNG\r\n\x1a\nnonsense")], "bad.png", 2),
    "empty image": (lambda t: ["demo", "--data", images(t / "d", empty=b"")], "empty.png", 2),
    "text as npz": (lambda t: ["demo", "--data", (t / "d.npz").write_text("x") and t / "d.npz"], "d.npz", 2),
    "npz without images": (lambda t: ["demo", "--data", npz(t, pictures=np.zeros(3))], "images", 2),
    "npz of floats": (lambda t: ["demo", "--data", npz(t, images=np.zeros((2, 28, 28, 1)))], "uint8", 2),
    "npz with pickles": (lambda t: ["demo", "--data", npz(t, images=np.array([Bomb()], object))], "d.npz", 2),
    "npz of no images": (lambda t: ["demo", "--data", npz(t, images=np.zeros((0, 28, 28, 1), np.uint8))], "image", 2),
    "labels of another length": (
        lambda t: ["demo", "--data", npz(t, images=np.zeros((4, 28, 28, 1), np.uint8), labels=np.zeros(3, int))],
        "label",
        2,
    ),
    "classes do not fit": (lambda t: ["demo", "--eval", classes(t)], "class", 2),
    "evaluation on calibration images": (lambda t: ["demo", "--eval", overlap(t)], "calibration", 2),
    "ratio of one": (lambda t: ["demo", "--mlp-ratio", 1.0], "mlp_ratio", 2),
    "negative ratio": (lambda t: ["demo", "--qk-ratio", -0.1], "qk_ratio", 2),
    "ratio is not a number": (lambda t: ["demo", "--mlp-ratio", "half"], "mlp-ratio", 2),
    "unknown target": (lambda t: ["demo", "--target", "openvin"], "openvino", 2),
    "target twice": (lambda t: ["demo", "--target", "ort", "--target", "ort"], "once", 2),
    "unknown precision": (lambda t: ["demo", "--precision", "int8"], "w8a8", 2),
    "precision the target has not": (lambda t: ["demo", "--target", "ort", "--precision", "w8a16"], "w8a16", 2),
    "unknown pruner": (lambda t: ["demo", "--pruner", "magic"], "magic", 2),
    "corp does not prune values": (lambda t: ["demo", "--pruner", "corp", "--vo-ratio", 0.5], "obs", 2),
    "no calibration images wanted": (lambda t: ["demo", "--calib-size", 0], "calib_size", 2),
    "no threads": (lambda t: ["demo", "--threads", 0], "threads", 2),
    "unknown option": (lambda t: ["demo", "--fast"], "--fast", 2),
    "no model": (lambda t: [], "MODEL", 2),
    "missing recipe": (lambda t: ["demo", "--recipe", t / "r.yaml"], "r.yaml", 2),
    "unknown recipe key": (lambda t: ["--recipe", recipe(t, "mlp_ration: 0.5")], "mlp_ratio", 2),
    "recipe is a list": (lambda t: ["--recipe", recipe(t, "- a")], "mapping", 2),
    "recipe of another schema": (lambda t: ["--recipe", recipe(t, "schema: 9")], "schema", 2),
    "recipe value of another kind": (lambda t: ["--recipe", recipe(t, "model: demo\nmlp_ratio: lots")], "mlp_ratio", 2),
    "timm model that is not there": (lambda t: ["timm:no_such_model"], "no_such_model", 2),
}


@pytest.mark.parametrize("name", COMPRESS)
def test_compress_refuses(run, tmp_path, name):
    make, fragment, expected = COMPRESS[name]
    (tmp_path / "in").mkdir()
    out = tmp_path / "out" / "b"
    out.parent.mkdir()
    code, stdout, stderr = run("compress", *make(tmp_path / "in"), "--out", out, "--json")
    error = json.loads(stdout)["error"]
    assert code == expected, stderr
    assert fragment in f"{error['message']} {error['hint']}"
    assert error["code"] not in ("InternalError", "") and "Traceback" not in stderr
    assert "\n" not in error["message"]
    assert list(out.parent.iterdir()) == []
    assert not Path("/tmp/vitrim-was-here").exists()


def test_an_existing_output_is_kept(run, tmp_path):
    out = occupied(tmp_path)
    code, stdout, _ = run("compress", "demo", "--out", out, "--json")
    assert code == 2 and "--force" in json.loads(stdout)["error"]["hint"]
    assert (out / "precious").read_text() == "keep me"


def test_an_output_in_no_folder_is_refused(run, tmp_path):
    code, stdout, _ = run("compress", "demo", "--out", tmp_path / "no" / "b", "--json")
    assert code == 2 and "must exist" in json.loads(stdout)["error"]["message"]


def test_without_json_the_error_is_on_stderr_only(run, tmp_path):
    code, stdout, stderr = run("compress", "demo", "--mlp-ratio", 1, "--out", tmp_path / "b")
    assert (code, stdout) == (2, "") and stderr.startswith("vitrim: mlp_ratio must be in [0, 1), got 1.0.")


def test_a_gate_whose_answer_cannot_be_written_measures_nothing(run, tmp_path):
    bundles = (tmp_path / "new", "--baseline", tmp_path / "old")  # neither exists, which comes second
    code, stdout, _ = run("gate", *bundles, "--junit", tmp_path / "no" / "gate.xml", "--json")
    assert code == 2 and "--junit" in json.loads(stdout)["error"]["message"]
    code, stdout, _ = run("gate", *bundles, "--junit", tmp_path / "gate.xml", "--json")
    assert code == 2 and json.loads(stdout)["error"]["code"] == "BundleError"


# name: (how a good bundle is broken, a part of the sentence)
def drop(name):
    return lambda b: (b / name).unlink()


def rewrite(change):
    def apply(b):
        content = json.loads((b / "manifest.json").read_text())
        change(content)
        (b / "manifest.json").write_text(json.dumps(content))

    return apply


BUNDLES = {
    "no manifest": (drop("manifest.json"), "manifest.json"),
    "missing file": (drop("golden.npz"), "golden.npz"),
    "manifest is not JSON": (lambda b: (b / "manifest.json").write_text("{"), "manifest.json"),
    "manifest of another schema": (rewrite(lambda m: m.update(schema=2)), "schema"),
    "unknown manifest key": (rewrite(lambda m: m.update(run="rm -rf /")), "run"),
    "path outside": (
        rewrite(lambda m: m["files"].update({"../../etc/passwd": next(iter(m["files"].values()))})),
        "inside",
    ),
    "absolute path": (rewrite(lambda m: m["files"].update({"/etc/passwd": next(iter(m["files"].values()))})), "inside"),
    "unlisted artifact": (rewrite(lambda m: m["targets"]["ort"].update(path="model.onnx")), "listed"),
    "wrong size": (rewrite(lambda m: m["files"]["config.json"].update(size=1)), "config.json"),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_a_broken_bundle_is_refused(run, bundle, image, tmp_path, name):
    breaking, fragment = BUNDLES[name]
    broken = tmp_path / "b"
    shutil.copytree(bundle, broken)
    breaking(broken)
    code, stdout, stderr = run("run", broken, image[0], "--json")
    error = json.loads(stdout)["error"]
    assert code == 2 and error["code"] == "BundleError" and fragment in error["message"], stderr


def test_a_zip_that_climbs_out_is_refused(run, image, tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("../evil", "x")
    code, stdout, _ = run("run", tmp_path / "b.zip", image[0], "--json")
    assert code == 2 and "inside" in json.loads(stdout)["error"]["message"] and not (tmp_path.parent / "evil").exists()


def test_run_refuses_a_bad_image_and_an_unknown_target(run, bundle, image, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    code, stdout, _ = run("run", bundle, tmp_path / "x.png", "--json")
    assert code == 2 and "x.png" in json.loads(stdout)["error"]["message"]
    code, stdout, _ = run("run", bundle, image[0], "--target", "null", "--json")
    assert code == 2 and "null" in json.loads(stdout)["error"]["message"]


def started(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "compressor", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - this process starts no threads of its own
        **options,
    )


def heed_interrupts():
    """A shell starts its background jobs with SIGINT ignored, and children inherit that; a user's terminal does not."""
    for sign in (signal.SIGINT, signal.SIGHUP):
        signal.signal(sign, signal.SIG_DFL)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing(tmp_path, sign):
    process = started(
        "compress",
        "demo",
        "--mlp-ratio",
        0.5,
        "--pruner",
        "corp",
        "--out",
        tmp_path / "b",
        "--json",
        env={"XDG_CACHE_HOME": str(tmp_path / "c")},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".b-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sign)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 3 and "Traceback" not in err
    assert json.loads(out)["error"]["code"] == "Interrupted"
    assert [p.name for p in tmp_path.iterdir() if p.name != "c"] == []


HEARS = """
import json, os, signal, sys
from compressor import console

ignored = json.loads(sys.argv.pop())
for sign in ignored:
    signal.signal(sign, signal.SIG_IGN)
stopped = []

def application(**_):
    for sign in ignored or (signal.SIGHUP, signal.SIGHUP):  # a hangup comes twice
        try:
            os.kill(os.getpid(), sign)
        except KeyboardInterrupt:
            stopped.append(sign)

console.main(application)
print(json.dumps(stopped))
"""


@pytest.mark.parametrize(("ignored", "raised"), [([], [signal.SIGHUP]), ([signal.SIGHUP], []), ([signal.SIGINT], [])])
def test_signals_that_nohup_or_a_shell_ignores_stay_ignored(ignored, raised):
    """In a process of one thread: with more, the system may hand a signal to any of them, later."""
    command = [sys.executable, "-c", HEARS, json.dumps(ignored)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, preexec_fn=heed_interrupts)
    assert json.loads(done.stdout) == raised


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_one_sentence(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True, check=False
        ).returncode
        != 0
    ):
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        process = started("compress", "demo", "--precision", "fp32", "--out", small / "b", "--json")
        out, err = process.communicate(timeout=600)
        assert process.returncode == 2 and "Traceback" not in err
        assert "space" in json.loads(out)["error"]["message"].lower()
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_one_sentence(run, tmp_path):
    (tmp_path / "ro").mkdir(mode=0o555)
    code, stdout, _ = run("compress", "demo", "--out", tmp_path / "ro" / "b", "--json")
    assert code == 2 and "ermission" in json.loads(stdout)["error"]["message"]


def test_an_answer_that_nobody_reads_is_no_traceback():
    """As in ``vitrim inspect demo --json | true``: the reading end is closed before the answer comes."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "compressor", "inspect", "demo", "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(write)
    assert done.returncode == 3 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
