"""What ONNX Runtime's QNN compiler leaves to the CPU on the Hexagon HTP; the same for every chip that this target builds for."""

from __future__ import annotations

from targets._constraints import Op, Rule, Table, words

__all__ = ["TABLE"]

LIST = "onnxruntime-qnn 2.x, docs/execution_providers/QNN-ExecutionProvider.md, 'Supported ONNX operators'"
MEASURED = "measured with onnxruntime-qnn 2.7.0"
LISTED = words("""
    Abs Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast CastLike Ceil Clip Concat Conv
    ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Exp Expand Flatten Floor Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GRU
    GroupNormalization HardSigmoid HardSwish If Identity InstanceNormalization Inverse IsNaN LRN LSTM
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean Min
    Mod Mul Neg NonMaxSuppression NonZero Not Or OneHot PRelu Pad Pow QLinearMatMul QuantizeLinear RandomNormalLike
    RandomUniformLike Range Reciprocal ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    Relu RMSNormalization Reshape Resize RoiAlign Round RotaryEmbedding STFT ScatterElements ScatterND Selu Shape
    Sigmoid Sign Sin Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile
    TopK Transpose Unsqueeze Upsample Where Xor
""")


def _erf(op: Op) -> str:
    """Below opset 20, ONNX Runtime's preparation for QNN turns the Erf of a GELU into one node; seen at opsets 15 and 18."""
    return f"an Erf runs on the CPU at opset {op.opset}; write GELU as one node" if op.opset >= 20 else ""


def _gather(op: Op) -> str:
    indices = op.values[1] if len(op.values) > 1 else None
    return "indices must not be negative" if indices is not None and (indices < 0).any() else ""


TABLE = Table(
    opsets=(0, 26),
    opset_source="onnxruntime-qnn 2.4.0 release notes: opset 26",
    width_multiple=32,
    width_source="Qualcomm 80-63442-10, 'Avoid low depth Activations': channels are rounded up to a multiple of 32",
    rules=(Rule("Erf", _erf, MEASURED), Rule("Gather", _gather, LIST)),
    listed=LISTED | {"Erf"},
    list_source=LIST,
)
