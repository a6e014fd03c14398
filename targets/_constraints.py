"""What an accelerator's compiler leaves to the CPU or refuses, as data, and its check against a graph. No vendor tool is needed.

    Table(rules=(Rule("Gather", rank_above_4, "vendor's operator list"),), ...)
    check(graph, table)  ->  (Finding("Gather", "/Gather", "rank must be at most 4, got 5", "vendor's operator list"),)

Each target keeps its tables in ``_NAME_constraints.py``. Every line of them says where it is from: the vendor's documentation,
or a compilation by the named version of the compiler. Where the two disagree, the compiler is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from compressor.types import Array

if TYPE_CHECKING:
    import onnx
    import onnx_ir

__all__ = ["Finding", "Op", "Rule", "Table", "check", "words"]

SMALL = 1024  # elements of a constant whose values are looked at: shapes, axes, exponents
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operation of a graph as the rules see it; an unknown shape is empty, an unknown size is 0."""

    name: str
    type: str
    opset: int
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    constant: tuple[bool, ...]  # of each input
    values: tuple[Array | None, ...]  # of each input that is a small constant
    attributes: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The largest rank among inputs and outputs."""
        return max((len(shape) for shape in (*self.inputs, *self.outputs)), default=0)


@dataclass(frozen=True)
class Finding:
    """One operation that will not run on the accelerator, and who says so."""

    op: str
    name: str
    reason: str
    source: str


@dataclass(frozen=True)
class Rule:
    """When operations of one type stay off the accelerator: `broken` gives the reason, or an empty string."""

    type: str
    broken: Callable[[Op], str]
    source: str


@dataclass(frozen=True)
class Table:
    """What one chip's compiler takes.

    Args:
        opsets: lowest and highest that it reads.
        opset_source: where that is from.
        width_multiple: channels are padded to a multiple of it.
        width_source: where that is from.
        rules: conditions on single operations.
        listed: every operation that the vendor names as accelerated; None where there is no such list.
        list_source: where that is from.
        output_rank: least rank of an output; below it the compiler ends with a reshape on the CPU. 0: any.
        output_source: where that is from.
    """

    opsets: tuple[int, int]
    opset_source: str
    width_multiple: int
    width_source: str
    rules: tuple[Rule, ...] = ()
    listed: frozenset[str] | None = None
    list_source: str = ""
    output_rank: int = 0
    output_source: str = ""


def words(text: str) -> frozenset[str]:
    """The words of `text`: a list of operations as a table writes it."""
    return frozenset(text.split())


def check(graph: onnx_ir.Model, table: Table) -> tuple[Finding, ...]:
    """Every operation of `graph` that `table` keeps off the accelerator, in order; what is constant is folded first."""
    found = list(_opset(graph.opset_imports.get("", 0), table))
    proto = _skeleton(graph)
    outputs = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in proto.output}
    for node, op in _operations(proto, graph.opset_imports.get("", 0)):
        told = _judge(op, table)
        if told is None:
            ranks = [len(outputs[name]) for name in node.output if name in outputs]
            if ranks and min(ranks) < table.output_rank:
                reason = (
                    f"an output must have rank {table.output_rank} or more, or a reshape is added, got {min(ranks)}"
                )
                told = Finding("Reshape", op.name, reason, table.output_source)
        if told is not None:
            found.append(told)
    return tuple(found)


def _opset(opset: int, table: Table) -> Iterable[Finding]:
    low, high = table.opsets
    if not low <= opset <= high:
        rule = f"from {low} to {high}" if low else f"at most {high}"
        yield Finding("graph", f"opset {opset}", f"the opset must be {rule}, got {opset}", table.opset_source)


def _judge(op: Op, table: Table) -> Finding | None:
    for rule in table.rules:
        reason = rule.broken(op) if rule.type == op.type else ""
        if reason:
            return Finding(op.type, op.name, reason, rule.source)
    if table.listed is not None and op.type not in table.listed:
        return Finding(op.type, op.name, "not among the operations that the chip computes", table.list_source)
    return None


def _operations(proto: onnx.GraphProto, opset: int) -> Iterable[tuple[onnx.NodeProto, Op]]:
    """The nodes that are left when those with nothing but constant inputs have been folded."""
    import onnx

    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in (*proto.value_info, *proto.input)
    }
    shapes |= {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in proto.output}
    values = {t.name: onnx.numpy_helper.to_array(t) for t in proto.initializer}
    shapes |= {name: array.shape for name, array in values.items()}
    constant = set(values) | {v.name for v in proto.input if v.doc_string == CONSTANT}
    for node in proto.node:
        given = [name for name in node.input if name]
        if all(name in constant for name in given):
            constant |= set(node.output)
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        yield (
            node,
            Op(
                node.name,
                node.op_type,
                opset,
                tuple(shapes.get(name, ()) for name in given),
                tuple(shapes.get(name, ()) for name in node.output),
                tuple(name in constant for name in given),
                tuple(values.get(name) for name in given),
                attributes,
            ),
        )


CONSTANT = "a large constant without its values"


def _skeleton(graph: onnx_ir.Model) -> onnx.GraphProto:
    """`graph` with every shape inferred, its large constants as inputs: no weight is copied, whatever its size."""
    import onnx
    import onnx_ir

    parts = graph.graph
    weights = {name: value.const_value for name, value in parts.initializers.items() if value.const_value is not None}
    large = {name: tensor for name, tensor in weights.items() if prod(tensor.shape.numpy()) > SMALL}
    inputs = [onnx_ir.to_proto(value) for value in parts.inputs if value.name not in weights]
    for name, tensor in large.items():
        inputs.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), tensor.shape.numpy(), CONSTANT))
    small = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in weights.items() if name not in large]
    outputs = [onnx_ir.to_proto(value) for value in parts.outputs]
    nodes = [onnx_ir.to_proto(node) for node in parts]
    proto = onnx.helper.make_graph(nodes, "skeleton", inputs, outputs, small)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
    model = onnx.helper.make_model(proto, opset_imports=imports, ir_version=graph.ir_version)
    return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
