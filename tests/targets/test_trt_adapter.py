"""What is asked of TensorRT 10 and 11, neither of which can be had without a GPU: a stand-in package writes it down."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from compressor.errors import ConfigError
from compressor.lower import lower
from compressor.types import Artifact, BuildOptions
from targets import _tensorrt_worker, trt
from tests.targets.networks import PLAIN, model

STAND_IN = '''
"""TensorRT as far as the adapter uses it. Engines are the words that were said; release 10 still has flags that 11 dropped."""
import enum

__version__ = "{release}.0.1"
said = []

class NetworkDefinitionCreationFlag(enum.IntEnum):
    {flags}

class BuilderFlag(enum.IntEnum):
    VERSION_COMPATIBLE = 3

class Of(enum.Enum):
    DETAILED, AMPERE_PLUS, ONELINE = range(3)

ProfilingVerbosity = HardwareCompatibilityLevel = LayerInformationFormat = Of

class ILogger:
    pass

class OnnxParser:
    num_errors = 0
    def __init__(self, network, log):
        pass
    def parse_from_file(self, file):
        return True

class Cache:
    def __init__(self, blob):
        self.blob = blob
    def serialize(self):
        return self.blob + b"+"

class Config:
    def add_optimization_profile(self, shapes):
        said.append("shapes %s" % (shapes.sizes,))
    def set_flag(self, flag):
        said.append(flag.name)
    def create_timing_cache(self, blob):
        return None if blob.startswith(b"damaged") else Cache(blob)
    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        said.append("timings %s" % cache.blob)
        return not cache.blob.startswith(b"other GPU")
    def get_timing_cache(self):
        return self.cache
    def __setattr__(self, name, value):
        self.__dict__[name] = value
        if name == "hardware_compatibility_level":
            said.append(value.name)

class Profile:
    def set_shape(self, name, *sizes):
        self.sizes = sizes

class Network:
    num_layers = 0

class Builder:
    def __init__(self, log):
        pass
    def create_network(self, flags):
        said.append("network %d" % flags)
        return Network()
    def create_builder_config(self):
        return Config()
    def create_optimization_profile(self):
        return Profile()
    def build_serialized_network(self, network, config):
        return b"engine"

class Runtime:
    def __init__(self, log):
        pass
    def deserialize_cuda_engine(self, plan):
        return self
    def create_engine_inspector(self):
        return self
    def get_engine_information(self, form):
        return "Name: blocks.0.fc1.matmul, LayerType: gemm, Inputs: [ {{ Name: a, Datatype: Half }}], Outputs: [ {{ Name: b }}]"
'''
FLAGS = {10: "EXPLICIT_BATCH = 0; STRONGLY_TYPED = 1", 11: "EXPLICIT_BATCH = 0"}


pytestmark = pytest.mark.skipif(
    find_spec("tensorrt") is not None, reason="TensorRT itself is here: tests/device/gpu runs it"
)


@pytest.fixture(params=FLAGS)
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A `tensorrt` of that release on the path, and an empty cache folder."""
    (tmp_path / "site").mkdir()
    source = STAND_IN.format(release=request.param, flags=FLAGS[request.param])
    (tmp_path / "site/tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield request.param
    forget()


def forget() -> None:
    sys.modules.pop("tensorrt", None)
    _tensorrt_worker.library.cache_clear()
    _tensorrt_worker.logger.cache_clear()


def said() -> list[str]:
    """What the stand-in was told since the last time."""
    words = _tensorrt_worker.library("tensorrt").said
    found = list(words)
    words.clear()
    return found


def built(folder: Path, chip: str = "") -> Artifact:
    planned = trt.plan(lower(model(PLAIN), trt.CAPABILITIES), BuildOptions(folder, "fp16", chip=chip))
    return trt.build_engine(planned, folder)


def test_networks_are_strongly_typed_in_both_releases(release, tmp_path):
    made = built(tmp_path)
    assert said()[0] == {10: "network 2", 11: "network 0"}[release]  # 11 knows nothing else
    assert made.settings["version"] == f"{release}.0.1"
    assert made.settings["products"] == "1 fp16"  # from the engine inspector's lines


def test_one_profile_serves_every_batch(release, tmp_path):
    made = built(tmp_path)
    assert "shapes ((1, 3, 32, 32), (1, 3, 32, 32), (64, 3, 32, 32))" in said()
    planned = trt.plan(lower(model(PLAIN), trt.CAPABILITIES), BuildOptions(tmp_path, "fp16"))
    trt.build_engine(replace(planned, settings={**planned.settings, "batch": "100"}), tmp_path)
    assert "shapes ((1, 3, 32, 32), (100, 3, 32, 32), (100, 3, 32, 32))" in said()
    assert made.settings["batch"] == "1"


def test_portable_engines_are_asked_for_by_the_chip(release, tmp_path):
    built(tmp_path)
    assert not {"AMPERE_PLUS", "VERSION_COMPATIBLE"} & set(said())
    built(tmp_path, "ampere+")
    assert "AMPERE_PLUS" in said()
    built(tmp_path, "version+")
    assert "VERSION_COMPATIBLE" in said()
    with pytest.raises(ConfigError, match="SM89"):
        built(tmp_path, "SM89")


def test_a_plan_that_names_no_chip_is_for_this_gpu(release, tmp_path):
    planned = trt.plan(lower(model(PLAIN), trt.CAPABILITIES), BuildOptions(tmp_path, "fp16"))
    made = trt.build_engine(replace(planned, settings={"stage": "plan"}), tmp_path)
    assert made.settings["chip"] == "" and made.path.is_file()


def test_timings_are_reused(release, tmp_path):
    built(tmp_path)
    assert "timings b''" in said()
    built(tmp_path / "another bundle")
    assert "timings b'+'" in said()
    assert [file.name for file in (tmp_path / "cache/vitrim").iterdir()] == ["tensorrt.timings"]


@pytest.mark.parametrize("stored", [b"damaged", b"other GPU"])
def test_timings_of_something_else_are_left_aside(release, stored, tmp_path):
    trt.timings().parent.mkdir(parents=True)
    trt.timings().write_bytes(stored)
    built(tmp_path)
    assert said()[-1] == "timings b''"
    assert trt.timings().read_bytes() == b"+"
