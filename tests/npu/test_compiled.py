"""What is said of compiled targets: operations left to the CPU, and estimates in place of timings."""

import pytest

from compressor.compiled import fallbacks, is_simulated, require_compilers
from compressor.errors import BundleError, ConfigError, DataError, TargetUnavailable
from compressor.inference import Source, profile_source
from compressor.profile_json import from_json
from targets import rknn
from tests.cli.conftest import vitrim
from tests.npu.bundles import bundle_of


def entry(name, *ops):
    return {"name": name, "cpu_ops": [{"name": op, "type": kind} for op, kind in ops]}


def test_the_first_operation_on_the_cpu_is_named_for_each_target():
    softmax = [(f"blocks.{i}.softmax", "Softmax") for i in range(3)]
    compiled = [entry("bpu", *softmax), entry("qnn"), entry("rknn", ("logits", "Reshape"))]
    assert fallbacks(compiled) == [
        "bpu: on the CPU, not the NPU: blocks.0.softmax (Softmax) and 2 more.",
        "rknn: on the CPU, not the NPU: logits (Reshape).",
    ]
    assert fallbacks([entry("qnn")]) == []


def test_requiring_an_npu_needs_a_target_for_one(tmp_path):
    require_compilers(("ort", "rknn"))
    with pytest.raises(ConfigError, match=r"for an NPU \(bpu, qnn, rknn\), got ort, openvino"):
        require_compilers(("ort", "openvino"))
    done = vitrim("compress", "demo", "--target", "ort", "--require-npu", "--out", tmp_path / "b", "--json")
    assert done.code == 2 and "--require-npu" in done.json["error"]["message"] and not (tmp_path / "b").exists()


def profiled(folder, **changed):
    return profile_source(Source(str(folder)), **{"batch": 1, "per_op": False, **changed})


def test_a_profile_of_a_simulated_target_is_its_estimate(tmp_path, monkeypatch):
    """Nothing is opened: the compiler need not be there."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing installed"))
    bundle_of("bpu", tmp_path / "b", latency_ms=8.0)
    found = profiled(tmp_path / "b", per_op=True)
    assert found["estimated"] is True and found["estimator"] == "nobody's estimate"
    assert found["latency_ms"] == {"min": None, "p50": 8.0, "p90": None, "p99": None, "mean": 8.0}
    assert found["images_per_s"] == 125.0 and found["npu_mac_share"] == 0.75 and found["device"] == {"chip": "a-chip"}
    assert found["cpu_ops"] == [{"name": "blocks.0.softmax", "type": "Softmax"}] and len(found["subgraphs"]) == 1
    assert [op["placement"] for op in found["ops"]] == ["NPU", "CPU"] and found["samples_ns"] == []
    assert profiled(tmp_path / "b")["ops"] == []


def test_no_latency_is_null_not_zero(tmp_path):
    bundle_of("rknn", tmp_path / "b")
    done = vitrim("profile", tmp_path / "b", "--target", "rknn", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["latency_ms"] is None and found["images_per_s"] is None and found["peak_rss_bytes"] is None
    assert found["subgraphs"][0]["cycles"] == 2_500_000 and found["estimated"] is True
    with pytest.raises(DataError, match="must be the object"):
        from_json(found)  # so that no gate compares with it
    shown = vitrim("profile", tmp_path / "b")
    assert "2.5 M cycles counted, no latency" in shown.out and "on the CPU: blocks.0.softmax" in shown.out


def test_an_estimated_profile_has_every_key_of_a_measured_one(tmp_path):
    bundle_of("bpu", tmp_path / "b", latency_ms=8.0)
    measured = profile_source(Source("demo", "null"), batch=1, per_op=False)
    estimated = profiled(tmp_path / "b")
    assert measured.keys() <= estimated.keys() and "estimated" not in measured
    assert estimated["latency_ms"].keys() == measured["latency_ms"].keys()


def test_what_an_estimate_cannot_say_is_refused(tmp_path):
    bundle = bundle_of("bpu", tmp_path / "b")
    with pytest.raises(ConfigError, match="streams must be 0 for target 'bpu', simulated here, got 2"):
        profiled(tmp_path / "b", streams=2)
    with pytest.raises(ConfigError, match="batch must be 1 for target 'bpu'"):
        profiled(tmp_path / "b", batch=2)
    file = bundle.artifact("bpu").path.with_name("model.estimate.json")
    file.write_text("{}")
    with pytest.raises(BundleError, match="was changed"):
        profiled(tmp_path / "b")


def test_on_the_board_nothing_is_estimated(tmp_path, monkeypatch):
    assert is_simulated("rknn") and not is_simulated("ort") and not is_simulated("tensorrt")
    monkeypatch.setattr(rknn, "on_board", lambda: True)
    assert not is_simulated("rknn")


def test_a_device_without_the_board_package_is_not_answered_for(tmp_path, monkeypatch):
    from compressor import runner

    bundle_of("bpu", tmp_path / "b")
    monkeypatch.setattr(runner, "BUNDLE", tmp_path / "b")
    asked = {"target": "bpu", "threads": 1, "batch": 1, "per_op": False, "streams": 0}
    with pytest.raises(TargetUnavailable, match="must have the vendor's board package, got none"):
        runner._profile(asked)
