"""The main job on the embedded model, end to end, through the command line."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from calibration import data
from compressor import __version__
from tests.cli.conftest import vitrim

REFERENCE_TOP1 = 91.85  # of the embedded model on its 2,000 evaluation images, in float


def test_compress_answers_with_the_promised_keys(made):
    result, _ = made
    promised = {
        "bundle",
        "model",
        "reference",
        "compressed",
        "targets",
        "timings_s",
        "peak_rss_bytes",
        "recipe",
        "seed",
    }
    assert promised <= result.keys()
    assert {"params", "macs", "top1", "top1_ci95"} <= result["reference"].keys()
    assert {"params", "macs", "top1", "top1_ci95", "agreement", "precision"} <= result["compressed"].keys()
    for target in result["targets"]:
        keys = {
            "name",
            "artifact",
            "size_bytes",
            "latency_ms",
            "reference_latency_ms",
            "speedup",
            "parity",
            "reverted",
            "reason",
        }
        assert keys <= target.keys()
        assert {"p50", "p90", "p99"} <= target["latency_ms"].keys() & target["reference_latency_ms"].keys()
        assert {"max_abs", "cosine", "agreement"} <= target["parity"].keys()


def test_half_the_model_loses_less_than_a_point(made):
    result, _ = made
    assert result["reference"]["params"] == 4_019_146
    assert abs(result["reference"]["top1"] - REFERENCE_TOP1) < 0.06  # one image of 2,000 may round the other way
    assert result["compressed"]["macs"] < 0.65 * result["reference"]["macs"]
    for target in result["targets"]:
        assert result["reference"]["top1"] - target["accuracy"]["top1"] <= 1.0


def test_the_bundle_is_complete(bundle):
    names = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*")}
    assert {
        "manifest.json",
        "model.safetensors",
        "config.json",
        "golden.npz",
        "report.json",
        "report.html",
        "targets/ort",
    } <= names
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {
        "schema",
        "spec",
        "preprocess",
        "labels",
        "recipe",
        "versions",
        "seed",
        "calibration",
        "checkpoint",
        "files",
    } <= manifest.keys()
    provenance = json.loads((bundle / "report.json").read_text())["provenance"]
    counts = {kind: provenance[kind]["count"] for kind in ("calibration", "evaluation")}
    assert counts["evaluation"] == 2000 > counts["calibration"] == manifest["calibration"]["count"]
    assert provenance["evaluation"]["sha256"] != provenance["calibration"]["sha256"]
    assert set(manifest["files"]) == {n for n in names if (bundle / n).is_file()} - {"manifest.json"}


def test_verify_passes_and_sees_a_changed_byte(bundle, tmp_path):
    done = vitrim("verify", bundle, "--json")
    assert done.code == 0 and done.json["passed"] is True
    assert {c["target"] for c in done.json["targets"]} == {"ort", "openvino"}
    broken = tmp_path / "b"
    shutil.copytree(bundle, broken)
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = vitrim("verify", broken, "--json")
    assert done.code == 1 and "model.safetensors" in done.json["error"]["message"]


def test_verify_sees_outputs_that_are_not_the_recorded_ones(bundle, tmp_path):
    from compressor.manifest import seal  # the attacker fixes the hashes too

    broken = tmp_path / "b"
    shutil.copytree(bundle, broken)
    golden = dict(np.load(broken / "golden.npz"))
    golden["outputs.ort"] = np.roll(golden["outputs.ort"], 1, axis=1)
    np.savez(broken / "golden.npz", **golden)
    content = json.loads((broken / "manifest.json").read_text())
    del content["schema"], content["files"]
    seal(broken, content)
    done = vitrim("verify", broken, "--target", "ort", "--json")
    assert done.code == 1 and done.json["passed"] is False


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_verify_asks_whose_bundle_it_is(bundle, tmp_path):
    signed, key, signers = tmp_path / "b", tmp_path / "key", tmp_path / "signers"
    shutil.copytree(bundle, signed)
    for arguments in (
        ("-t", "ed25519", "-N", "", "-f", key),
        ("-Y", "sign", "-n", "vitrim", "-f", key, signed / "manifest.json"),
    ):
        subprocess.run(["ssh-keygen", "-q", *arguments], check=True)
    signers.write_text(f"alice {key.with_suffix('.pub').read_text()}")
    done = vitrim("verify", signed, "--target", "ort", "--signers", signers, "--json")
    assert done.code == 0 and done.json["signature"]["signer"] == "alice"
    done = vitrim("verify", bundle, "--target", "ort", "--signers", signers)
    assert done.code == 1 and "signature: FAIL: the bundle is not signed" in done.out


def test_run_names_the_class(bundle, image):
    path, label = image
    done = vitrim("run", bundle, path, "--json")
    assert done.code == 0
    best = done.json["results"][0]["top"][0]
    labels = json.loads((bundle / "manifest.json").read_text())["labels"]
    assert best["label"] == labels[label] and 0 < best["probability"] <= 1


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_profile_answers_with_the_promised_keys(bundle, target):
    done = vitrim("profile", bundle, "--target", target, "--per-op", "--json")
    assert done.code == 0, done.err
    keys = {
        "target",
        "device",
        "runs",
        "warmup",
        "threads",
        "batch",
        "latency_ms",
        "samples_ns",
        "load_ms",
        "first_run_ms",
        "peak_rss_bytes",
        "ops",
    }
    assert keys <= done.json.keys()
    assert {"min", "p50", "p90", "p99", "mean"} <= done.json["latency_ms"].keys()
    assert {"name", "type", "placement", "time_ms", "share"} <= done.json["ops"][0].keys()
    assert len(done.json["samples_ns"]) == done.json["runs"]
    assert sum(op["share"] for op in done.json["ops"]) == pytest.approx(1, abs=1e-6)


def test_profile_of_a_batch(bundle):
    done = vitrim("profile", bundle, "--batch", 3, "--streams", 2, "--json")
    assert done.code == 0 and done.json["batch"] == 3
    assert done.json["throughput"]["streams"] == 2 and done.json["throughput"]["images_per_s"] > 0


def test_eval_agrees_with_what_compress_said(made):
    result, bundle = made
    done = vitrim("eval", bundle, "--data", "demo:eval", "--target", "ort", "--json")
    assert done.code == 0, done.err
    assert {"n", "top1", "top1_ci95", "top5", "agreement", "flips", "mean_cosine"} <= done.json.keys()
    assert done.json["top1"] == next(t["accuracy"]["top1"] for t in result["targets"] if t["name"] == "ort")
    assert not done.json["calibrated_on_them"]


def test_inspect(bundle):
    done = vitrim("inspect", "demo", "--json")
    assert done.code == 0 and done.json["params"] == 4_019_146
    assert {"family", "params", "macs", "embed_dim", "blocks", "preprocess"} <= done.json.keys()
    assert {"heads", "qk_dim", "v_dim", "mlp_dim"} <= done.json["blocks"][0].keys()
    small = vitrim("inspect", bundle, "--json").json
    assert small["blocks"][0]["mlp_dim"] == done.json["blocks"][0]["mlp_dim"] // 2


def test_version():
    done = vitrim("--version")
    assert done.code == 0 and done.out == f"vitrim {__version__}\n"


def test_doctor_lists_every_target():
    done = vitrim("doctor", "--json")
    assert done.code == 0
    assert {"ort", "openvino", "null"} <= {t["name"] for t in done.json["targets"]}
    assert all({"name", "available", "runs", "version", "reason", "fix"} <= t.keys() for t in done.json["targets"])


def test_a_bundle_is_the_input_of_another_compress(bundle, tmp_path, cache):
    out = tmp_path / "again.zip"
    done = vitrim(
        "compress",
        bundle,
        "--data",
        "demo",
        "--precision",
        "fp32",
        "--calib-size",
        64,
        "--out",
        out,
        "--zip",
        "--json",
        env=cache,
    )
    assert done.code == 0, done.err
    assert done.json["compressed"]["precision"] == "fp32" and out.is_file()
    assert vitrim("verify", out).code == 0
    # All that a folder can do, a .zip can: what it was unpacked to lives as long as it is needed
    assert vitrim("inspect", out, "--json").json["params"] == done.json["compressed"]["params"]
    profile = vitrim("profile", out, "--per-op", "--streams", 2, "--json")
    assert profile.code == 0 and profile.json["ops"] and profile.json["throughput"]["images_per_s"] > 0, profile.err
    measured = vitrim("eval", out, "--data", "demo", "--json")
    assert measured.code == 0 and measured.json["agreement"] == 100.0, measured.err
    assert measured.json["calibration_images"] == 64  # said, for such an accuracy proves nothing
    calibration, evaluation = data.open_images("demo", limit=64).items, data.open_images("demo:eval").items
    np.savez(tmp_path / "mixed.npz", images=np.stack([*calibration[:3], *evaluation[:5]]))
    mixed = vitrim("eval", out, "--data", tmp_path / "mixed.npz", "--json").json
    assert mixed["calibrated_on_them"] and (mixed["calibration_images"], mixed["n"]) == (3, 8)  # by what they show


def test_a_second_run_reuses_finished_stages(made, tmp_path, cache):
    result, _ = made
    arguments = ("--mlp-ratio", 0.5, "--qk-ratio", 0.5, "--pruner", "corp", "--precision", "w8a8", "--target", "ort")
    done = vitrim("compress", "demo", *arguments, "--out", tmp_path / "b", "--json", env=cache)
    assert done.code == 0 and "prune (reused)" in done.err
    assert done.json["compressed"]["params"] == result["compressed"]["params"]


def test_a_target_that_is_completed_on_the_device_gets_a_build_plan(tmp_path, cache):
    listed = {t["name"]: t for t in vitrim("doctor", "--json").json["targets"]}
    if listed["tensorrt"]["available"]:
        pytest.skip("TensorRT is installed here: its engines are built, not planned")
    out = tmp_path / "b"
    arguments = ("--precision", "fp32", "--calib-size", 32, "--target", "tensorrt")
    done = vitrim("compress", "demo", *arguments, "--out", out, "--json", env=cache)
    assert done.code == 0, done.err
    (plan,) = done.json["plans"]
    assert plan["name"] == "tensorrt"
    if listed["tensorrt-rtx"]["available"]:  # a builder that needs no GPU
        found = plan["checked"]["engines"]["fp32"]
        assert (found["foreign_types"], found["added_casts"], plan["checked"]["refused"]) == ("0", "0", {})
        (checked,) = vitrim("build", out, "--target", "tensorrt", "--check", "--json").json["engines"].values()
        assert checked == found
    else:
        assert (
            "doctor --install"
            in vitrim("build", out, "--target", "tensorrt", "--check", "--json").json["error"]["message"]
        )
    assert [t["name"] for t in done.json["targets"]] == ["ort"]
    checks = {c["target"]: c["passed"] for c in vitrim("verify", out, "--json").json["targets"]}
    assert checks == {"ort": True, "tensorrt": None}
    refused = vitrim("build", out, "--target", "tensorrt", "--json")
    assert refused.code == 3 and refused.json["error"]["code"] == "TargetUnavailable"


def test_gate_passes_the_same_bundle(bundle, tmp_path):
    page, xml = tmp_path / "gate.md", tmp_path / "gate.xml"
    # A generous limit: what is tested is the command, not the machine.
    limits = ("--max-regression", "100%", "--confidence", 0.9, "--max-drop", 0.5)
    written = ("--markdown", page, "--junit", xml, "--history", tmp_path / "history")
    done = vitrim("gate", bundle, "--baseline", bundle, *limits, *written, "--json")
    assert done.code == 0, done.err
    keys = {"verdict", "sentence", "ratio", "ratio_ci", "limit", "min_detectable", "pairs", "device"}
    assert keys <= done.json.keys() and done.json["verdict"] == "pass" and done.json["limit"] == 2.0
    assert "within the limits" in page.read_text() and "<testsuite" in xml.read_text()
    assert vitrim("gate", bundle, "--json").code == 2
    simulated = vitrim("gate", bundle, "--baseline", bundle, "--target", "rknn")
    assert simulated.code == 2 and "only a simulator is here" in simulated.err
    assert done.json["target"] == "ort" and len(done.json["history"]["p50_ms"]) == 1
    drawn = vitrim("report", "--history", tmp_path / "history", "--json")
    assert drawn.code == 0 and "target ort" in (tmp_path / "history/history.html").read_text()


def test_report_is_one_page(bundle, tmp_path):
    page = tmp_path / "r.html"
    assert vitrim("report", bundle, "--out", page).code == 0
    assert vitrim("report", "--json").code == 2 and vitrim("report", bundle, "--history", tmp_path).code == 2
    assert "--history" in vitrim("report", "--history", tmp_path, "--json").json["error"]["hint"]
    text = page.read_text()
    assert "</html>" in text and "http://" not in text.replace("http://www.w3.org", "") and "<script src" not in text


def test_help_of_every_command_has_examples():
    for name in (
        "compress",
        "profile",
        "eval",
        "run",
        "verify",
        "inspect",
        "doctor",
        "report",
        "gate",
        "build",
        "compare",
    ):
        done = vitrim(name, "--help")
        assert done.code == 0 and f"vitrim {name}" in done.out.split("Options")[-1], name
