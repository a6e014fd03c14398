"""The layout is a rule, not a habit: imports go one way, runtimes stay in their target file, and importing is lean."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIMES = {
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt_rtx_bindings",
    "onnxruntime_qnn",
    "rknn",
    "rknnlite",
    "horizon_tc_ui",
    "hobot_dnn",
    "hobot_dnn_rdkx5",
}

# Lower layers may not import higher ones; stages of layer 1 may not import each other.
FOUNDATION = {
    "accounts",
    "affinity",
    "errors",
    "spec",
    "types",
    "intervals",
    "device",
    "roofline",
    "kernels",
    "least_squares",
    "linalg",
    "result",
    "vit",
}
TOP = {"__main__", "cli", "cli_build", "cli_device", "cli_gate", "cli_pages", "cli_search", "console", "show"}
ORCHESTRATION = {
    *(
        "build_plan",
        "bundle",
        "cache",
        "candidates",
        "compare",
        "compiled",
        "doctor",
        "duel",
        "gating",
        "peaks",
        "inference",
        "inventory",
        "loading",
        "manifest",
        "output",
        "pipeline",
        "placement",
        "probe",
        "quantizing",
        "race",
        "recipe",
        "remote",
        "replies",
        "runner",
        "search",
    ),
    *("signature", "stages", "transport", "verdicts", "worker"),
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("compressor", "calibration", "targets"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, name: str) -> set[str]:
    """Absolute names of our modules that `path` imports at any level; TYPE_CHECKING blocks count too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{name} must import absolutely, got a relative import of {base!r}"
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def unit(name: str) -> str:
    """The stage a module belongs to: a file of compressor, or its sub-package; calibration and targets are one each."""
    parts = name.split(".")
    return parts[1] if parts[0] == "compressor" and len(parts) > 1 else parts[0]


def layer(name: str) -> int:
    part = unit(name)
    if part == "compressor" or part in FOUNDATION:
        return 0
    return 3 if part in TOP else 2 if part in ORCHESTRATION else 1


def violations(found: dict[str, set[str]]) -> list[str]:
    ours = set(found)
    bad = []
    for name, targets in found.items():
        for other in targets & ours:
            same = unit(name) == unit(other)
            if same or other == "compressor":
                continue
            if layer(other) > layer(name) or (layer(name) == layer(other) == 1):
                bad.append(f"{name} (layer {layer(name)}) imports {other} (layer {layer(other)})")
    return sorted(bad)


def test_imports_go_one_way():
    found = {name: imports(path, name) for name, path in modules().items()}
    assert violations(found) == []


def test_the_rule_sees_a_violation():
    planted = {
        "compressor.verify": {"compressor.pipeline"},
        "compressor.pipeline": set(),
        "compressor.lower.qdq": {"compressor.quantize"},
        "compressor.quantize": set(),
    }
    assert len(violations(planted)) == 2


def runtime_uses(path: Path) -> list[str]:
    """Runtimes imported by a file, with whether the import is inside a function."""
    tree = ast.parse(path.read_text())
    checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(n) for block in checking for n in ast.walk(block)}
    nested = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in skipped:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            uses += [
                f"{n} {'inside' if id(node) in nested else 'at the top'}" for n in names if n.split(".")[0] in RUNTIMES
            ]
    return uses


def test_runtimes_are_imported_only_inside_functions_of_target_files():
    for name, path in modules().items():
        for use in runtime_uses(path):
            assert name.startswith("targets."), f"{name} imports {use}"
            assert use.endswith("inside"), f"{name} imports {use}"


def test_the_rule_sees_a_runtime(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("import onnxruntime as ort\ndef f():\n    import openvino\n")
    assert runtime_uses(planted) == ["onnxruntime at the top", "openvino inside"]


PACKAGES = ("torch", "onnx", "onnx_ir", "onnxruntime", "openvino", "nncf", "numpy", "pydantic", "PIL")
HEAVY = f"sorted(m for m in {PACKAGES} if m in sys.modules)"


def loaded_by(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint({HEAVY})"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.strip()


def test_importing_compressor_loads_nothing_heavy():
    assert loaded_by("import compressor") == "[]"
    assert loaded_by("import compressor.cli") == "[]"
    assert "numpy" in loaded_by("import compressor.types")  # the check can see a module


@pytest.mark.parametrize(
    "module",
    [
        "compressor.bundle",
        "compressor.worker",
        "compressor.profile",
        "compressor.gate",
        "targets.ort",
        "calibration.data",
    ],
)
def test_what_the_device_needs_loads_no_torch(module):
    loaded = loaded_by(f"import {module}")
    assert "torch" not in loaded and "onnx_ir" not in loaded and "'onnx'" not in loaded


def test_files_stay_small():
    sizes = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {n: s for n, s in sizes.items() if s > 400} == {}
