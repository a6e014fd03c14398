"""What a device answers, checked before anything here believes it. Pure functions.

A device may be broken or hostile: sizes are bounded, every key is checked against its schema, text is freed of control
characters (it ends up on a terminal), and figures that follow from the samples are computed here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from compressor import errors
from compressor.errors import DataError, TargetUnavailable, VitrimError
from compressor.probe import MARK
from compressor.profile_json import from_json, to_json
from compressor.race import Raced
from compressor.types import OpRecord, Precision

__all__ = ["Found", "built", "checks", "failure", "found", "marked", "profile", "raced", "readable"]

LARGEST = 2**63 - 1  # of an integer; numpy holds no larger one
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]  # sums and rates of them stay finite
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Samples = Annotated[list[Count], Field(min_length=1, max_length=1_000_000)]
Allowed = Mapping[str, Collection[Any]]  # by key: the values that answer what was asked
LONGEST = 2000  # characters of one text shown


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Found(_Strict):
    """What `compressor.probe` prints: version, packages missing, free space, and sha256 of every file by name."""

    python: Annotated[list[Whole], Field(min_length=3, max_length=3)]
    missing: list[str]
    free_bytes: Whole
    files: dict[str, str]


class _Checked(_Strict):
    target: str
    passed: bool
    max_abs: Amount | None  # None: outputs were not finite
    tolerance: Amount


class _Skipped(_Strict):
    target: str
    passed: None
    skipped: str


class _Verified(_Strict):
    bundle: str
    passed: bool
    files: Whole
    signature: None
    targets: list[_Checked | _Skipped]


class _Latency(_Strict):
    min: Amount
    p50: Amount
    p90: Amount
    p99: Amount
    mean: Amount


class _Engine(_Strict):
    precision: Precision
    size_bytes: Whole
    latency_ms: _Latency
    samples_ns: Samples
    agreement: Annotated[float, Field(ge=0, le=100)]
    settings: dict[str, str]
    kept: bool


class _Built(_Strict):
    bundle: str
    target: str
    precision: Precision
    latency_ms: _Latency
    reason: str
    candidates: list[_Engine]
    batch: int
    refused: dict[str, str]
    device: dict[str, Any]


class _Failure(_Strict):
    code: str
    message: str
    hint: str


class _Op(_Strict):
    name: str
    type: str
    placement: str
    precision: str
    time_ms: Amount
    share: Amount


class _Part(_Strict):
    block: Whole | None
    part: str
    precision: str
    placements: list[str]
    time_ms: Amount
    share: Amount
    efficiency: Amount | None


class _Throughput(_Strict):
    streams: Count
    images_per_s: Amount


class _Profile(_Strict):
    target: str
    precision: Precision
    device: dict[str, Any]
    runs: Whole
    warmup: Whole
    threads: Count
    batch: Count
    latency_ms: dict[str, Any]
    latency_ci95_ms: dict[str, Any]
    images_per_s: Amount
    samples_ns: Samples
    load_ms: Amount
    first_run_ms: Amount
    peak_rss_bytes: Whole
    conditions: dict[str, Any]
    yardstick_ns: Samples
    ops: list[_Op]
    parts: list[_Part]
    throughput: _Throughput | None = None


class _Node(_Strict):
    name: str
    type: str
    placement: str
    precision: str
    time_ms: Amount


class _Raced(_Strict):
    samples_ns: dict[str, Samples]
    ops: dict[str, list[_Node]]
    device: dict[str, Any]


def marked(text: str) -> dict[str, Any] | None:
    """The JSON object in the last marked line of `text`, cleaned; None where there is none.

    A login shell may print before it: that is not marked.

    Raises:
        TargetUnavailable: the line is not a JSON object of finite numbers.
    """
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    if not lines:
        return None
    try:
        value = _clean(json.loads(lines[-1][len(MARK) :], parse_constant=_refuse))
    except (ValueError, RecursionError) as error:
        raise TargetUnavailable(f"the device's answer must be JSON, got {error}.") from None
    if not isinstance(value, dict):
        raise TargetUnavailable(f"the device's answer must be a JSON object, got {type(value).__name__}.")
    return value


def readable(text: str) -> str:
    """`text` on one line, of bounded length and without control characters.

    >>> readable("a\\x1b[31m\\nb")
    'a?[31m b'
    """
    short = " ".join(text[:LONGEST].splitlines())
    return "".join(c if c.isprintable() else "?" for c in short)


def found(answer: Mapping[str, Any]) -> Found:
    """A probe's answer.

    Raises:
        TargetUnavailable: it is not one.
    """
    checked: Found = _checked(TypeAdapter(Found), answer)
    return checked


def checks(answer: Any, names: Iterable[str]) -> list[dict[str, Any]]:
    """The ``targets`` of a ``vitrim verify --json`` object made there, one for each of `names`.

    Raises:
        TargetUnavailable: it is not that.
    """
    found: list[dict[str, Any]] = _checked(TypeAdapter(_Verified), answer).model_dump()["targets"]
    _answers({"targets": [check["target"] for check in found]}, {"targets": (list(names),)})
    return found


def built(answer: Any, asked: Allowed) -> dict[str, Any]:
    """The ``vitrim build --json`` object made there, of what was `asked`.

    Raises:
        TargetUnavailable: it is not that.
    """
    found: dict[str, Any] = _checked(TypeAdapter(_Built), answer).model_dump()
    _answers(found, asked)
    return found


def profile(answer: Any, asked: Allowed) -> dict[str, Any]:
    """The ``vitrim profile --json`` object of a profile made there, of what was `asked`; percentiles and rates are computed
    from its samples.

    Raises:
        TargetUnavailable: it is not that.
    """
    found = _checked(TypeAdapter(_Profile), answer).model_dump()
    _answers(found, asked)
    try:
        measured = to_json(from_json(found))
    except DataError as error:
        raise TargetUnavailable(f"the device's answer is not valid: {error}") from None
    result = {"precision": found["precision"], **measured, "parts": found["parts"]}
    if found["throughput"] is not None:
        result["throughput"] = found["throughput"]
    return result


def raced(answer: Any, names: Iterable[str]) -> Raced:
    """What a race there found of the artifacts `names`.

    Raises:
        TargetUnavailable: it is not that.
    """
    checked: _Raced = _checked(TypeAdapter(_Raced), answer)
    if (
        not checked.samples_ns.keys() == checked.ops.keys() == set(names)
        or len(set(map(len, checked.samples_ns.values()))) != 1
    ):
        raise TargetUnavailable(
            "the device's answer is not valid: every artifact must have as many samples as the others."
        )
    ops = {name: tuple(OpRecord(**node.model_dump()) for node in nodes) for name, nodes in checked.ops.items()}
    return Raced({name: tuple(times) for name, times in checked.samples_ns.items()}, ops.__getitem__, checked.device)


def failure(answer: Any, url: str) -> VitrimError:
    """The error that stopped a job there, as the class it was, naming the device."""
    said = _checked(TypeAdapter(_Failure), answer)
    kind = getattr(errors, said.code, None) if said.code in errors.__all__ else None
    known = kind if isinstance(kind, type) and issubclass(kind, VitrimError) else TargetUnavailable
    return known(f"{url}: {said.message}", hint=said.hint)


def _checked(adapter: TypeAdapter[Any], answer: Any) -> Any:
    try:
        return adapter.validate_python(answer)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise TargetUnavailable(
            f"the device's answer is not valid: {readable(where)}: {readable(first['msg'])}."
        ) from None


def _answers(found: Mapping[str, Any], asked: Allowed) -> None:
    for key, allowed in asked.items():
        if found[key] not in allowed:
            rule = " or ".join(map(repr, allowed))
            raise TargetUnavailable(f"the device's answer is not valid: {key} must be {rule}, got {found[key]!r}.")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, list):
        return [_clean(v) for v in value]
    if isinstance(value, dict):
        return {readable(k): _clean(v) for k, v in value.items()}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):  # 1e999 is valid JSON
        raise ValueError("a number that is not finite")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError("a number of more than 64 bits")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant}, which is not JSON")
