"""A small emitter of ONNX graphs: nodes and constants are named by their place in the model, files are reproducible.

Node names follow the model (``blocks.3.fc1.matmul``), so that a runtime's per-node profile folds back onto blocks.
The same calls give the same bytes: names are never generated, and insertion order is the order of execution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["GraphBuilder"]

Array = NDArray[Any]
Attribute = int | float | str | Sequence[int]
IR_VERSIONS = ((21, 10), (19, 9), (15, 8), (0, 7))  # (first opset, ONNX IR version published with it)
CONTRIB = "com.microsoft"


class GraphBuilder:
    """Collects nodes and constants, then returns an `onnx_ir.Model`.

    Args:
        opset: version of the default ONNX domain.
        batch: "batch" for a free batch axis, or its fixed size.
    """

    def __init__(self, opset: int, batch: str | int) -> None:
        self.opset = opset
        self.batch = batch
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}

    def input(self, name: str, shape: Sequence[int]) -> ir.Value:
        """A float32 graph input of `shape` behind the batch axis."""
        value = ir.Value(name=name, shape=ir.Shape([self.batch, *shape]), type=ir.TensorType(ir.DataType.FLOAT))
        self._inputs.append(value)
        return value

    def constant(self, name: str, array: Array) -> ir.Value:
        """The initializer `name`; a second call with the same name returns the first one."""
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(np.shape(array)), name=name)
        return self._initializer(name, tensor, array.shape)

    def deferred(self, name: str, shape: Sequence[int], dtype: np.dtype[Any], make: Callable[[], Array]) -> ir.Value:
        """The initializer `name` whose array is made when the graph is written: the graph holds no copy of the weights."""
        kind, size = ir.DataType.from_numpy(dtype), ir.Shape(shape)
        tensor = ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype=kind, shape=size, name=name)
        return self._initializer(name, tensor, shape)

    def _initializer(self, name: str, tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.Value:
        if name not in self._constants:
            kind = ir.TensorType(tensor.dtype)
            self._constants[name] = ir.Value(name=name, shape=ir.Shape(shape), type=kind, const_value=tensor)
        return self._constants[name]

    def ints(self, name: str, values: Sequence[int]) -> ir.Value:
        """An int64 vector constant: shapes, axes, bounds."""
        return self.constant(name, np.asarray(values, dtype=np.int64))

    def floats(self, name: str, value: float) -> ir.Value:
        """A float32 scalar constant."""
        return self.constant(name, np.asarray(value, dtype=np.float32))

    def op(
        self, name: str, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """The output of one new node; the output carries the node's name."""
        return self.ops(name, op_type, (name,), *inputs, domain=domain, **attributes)[0]

    def ops(
        self,
        name: str,
        op_type: str,
        outputs: Sequence[str],
        *inputs: ir.Value | None,
        domain: str = "",
        **attributes: Attribute,
    ) -> tuple[ir.Value, ...]:
        """The outputs, named `outputs`, of one new node."""
        values = tuple(ir.Value(name=output) for output in outputs)
        self._nodes.append(
            ir.Node(domain, op_type, inputs, ir.convenience.convert_attributes(attributes), outputs=values, name=name)
        )
        return values

    def reshape(self, name: str, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """`x` as (batch, *shape); the batch axis is copied, or written out when it is fixed."""
        lead = self.batch if isinstance(self.batch, int) else 0
        return self.op(name, "Reshape", x, self.ints(f"{name}.shape", [lead, *shape]))

    def slice(self, name: str, x: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        """``x[start:stop]`` along `axis`."""
        bounds = [self.ints(f"{name}.{part}", [v]) for part, v in (("start", start), ("stop", stop), ("axis", axis))]
        return self.op(name, "Slice", x, *bounds)

    def finish(self, name: str, output: ir.Value, shape: Sequence[int]) -> ir.Model:
        """The model whose only output is `output`, float32 (batch, *shape)."""
        output.shape = ir.Shape([self.batch, *shape])
        output.type = ir.TensorType(ir.DataType.FLOAT)
        opsets = {"": self.opset} | {node.domain: 1 for node in self._nodes if node.domain}
        graph = ir.Graph(
            self._inputs,
            [output],
            nodes=self._nodes,
            initializers=tuple(self._constants.values()),
            opset_imports=opsets,
            name=name,
        )
        version = next(v for first, v in IR_VERSIONS if self.opset >= first)
        return ir.Model(graph, ir_version=version, producer_name="vitrim")
