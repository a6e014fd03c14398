"""What is said about operations that a vendor's compiler left to the CPU."""

import pytest

from compressor.compiled import fallbacks, require_compilers
from compressor.errors import ConfigError
from tests.cli.conftest import vitrim


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
