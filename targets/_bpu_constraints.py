"""What D-Robotics' mapper leaves to the CPU, per chip: bayes-e (RDK X5), bayes (RDK Ultra), bernoulli2 (RDK X3).

The vendor's lists name what each chip may compute. Compilations by mapper 1.24.3 with HBDK 3.49.15 correct them: a kernel of
32 x 32 and a SpaceToDepth of 4 run on the BPU although the list for the RDK X5 stops at 31 and 2, and the Erf of a GELU is part
of one table look-up on chips whose list leaves Erf to the CPU. An operation that the list allows may still be put beside others
on the CPU ("passive quantization"): on bernoulli2 the embedded model's poolings, powers and padding are.
"""

from __future__ import annotations

from math import prod

from targets._constraints import Op, Rule, Table, words

__all__ = ["TABLES"]

LIST = "D-Robotics RDK documentation, 'Supported Operator Lists and Restrictions', ONNX list for {}"
LIST_X5, LIST_ULTRA, LIST_X3 = (LIST.format(board) for board in ("RDK X5", "RDK Ultra", "RDK X3"))
MEASURED = "measured with hb_mapper 1.24.3, HBDK 3.49.15"

EVERYWHERE = words("""
    Add ArgMax AveragePool BatchNormalization Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos
    DepthToSpace Div Dropout Erf Exp Gemm GlobalAveragePool GlobalMaxPool LSTM LeakyRelu MatMul MaxPool Mul Pad Pow
    Reciprocal ReduceMean Relu Resize Shape Sigmoid Sin Size Slice Softmax Softplus SpaceToDepth Split Sqrt Sum Tanh
    Upsample
""")
BAYES = words("""
    Abs ArgMin Atan Ceil Elu Equal Expand Flatten Floor Gather GatherElements Greater GreaterOrEqual GridSample
    HardSigmoid Less LessOrEqual Log Max Min ReduceMax ReduceSum Reshape Squeeze Sub Tile TopK Transpose Unsqueeze
""")
BAYES_E = words("""
    Acos Acosh Asin Asinh Atanh Cosh PRelu Round Selu Sign Sinh Softsign Tan
""")
LONGEST_ROW = 197  # tokens: the shortest row on which the compiler was seen to run without end


def _softmax(op: Op) -> str:
    del op  # Unused: the axis does not matter
    return "a softmax runs on the CPU; the option that moves it makes the compiler run without end"


def _by_default(op: Op) -> str:
    return f"{op.type} runs on the CPU unless the node is named in run_on_bpu"


def _gather(op: Op) -> str:
    return f"ranks must be at most 4, got {op.rank}" if op.rank > 4 else ""


def _pad(op: Op) -> str:
    return (
        f"only tensors of rank 4 and 5 are padded, got rank {op.rank}; the mapper refuses the model"
        if op.rank < 4
        else ""
    )


def _conv(op: Op) -> str:
    kernel = op.inputs[1]
    if prod(kernel[1:]) > 32767:
        return f"channels x height x width of a kernel must be at most 32767, got {prod(kernel[1:])}"
    if max(kernel[:2], default=0) > 8192:
        return f"channels must be at most 8192, got {max(kernel[:2])}"
    if max(op.attributes.get("strides", [1])) > 256:
        return f"strides must be at most 256, got {max(op.attributes['strides'])}"
    return ""


def _product(op: Op) -> str:
    if any(op.constant):  # becomes a convolution
        return ""
    first, second = op.inputs
    if len(first) != len(second):
        return f"two computed factors must have the same rank, got {len(first)} and {len(second)}"
    longest = max(*first[-2:], *second[-2:])
    return f"rows and columns must be at most 8192, got {longest}" if longest > 8192 else ""


def _window(op: Op) -> str:
    longest = max(op.attributes.get("kernel_shape", [0]))
    if longest > 256:
        return f"windows must be at most 256, got {longest}"
    return f"the compiler does not finish a window of {longest}" if longest >= LONGEST_ROW else ""


def _row_maximum(op: Op) -> str:
    longest = max((op.inputs[0][axis] for axis in op.attributes.get("axes", []) if op.inputs[0]), default=0)
    return f"the compiler does not finish a maximum over {longest}" if longest >= LONGEST_ROW else ""


def _product_x3(op: Op) -> str:
    if len(op.constant) == 2 and op.constant[1]:
        return ""
    second = op.inputs[1]
    wide = [size for size in second[:-2] if size != 1]
    return f"the second computed factor must be one matrix, got {' x '.join(map(str, second))}" if wide else ""


def _conv_x3(op: Op) -> str:
    kernel = op.inputs[1]
    if max(kernel[2:], default=0) > 7:
        return f"kernels must be at most 7 x 7, got {' x '.join(map(str, kernel[2:]))}"
    return f"a kernel must hold at most 32768 values, got {prod(kernel[1:])}" if prod(kernel[1:]) > 32768 else ""


COMMON = (
    Rule("Softmax", _softmax, MEASURED),
    Rule("Pad", _pad, MEASURED),
)
BOTH_BAYES = (
    *COMMON,
    *(
        Rule(kind, _by_default, LIST_X5)
        for kind in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Min")
    ),
    Rule("Gather", _gather, f"{LIST_X5}; {MEASURED}"),
    Rule("Conv", _conv, LIST_X5),
    Rule("MatMul", _product, LIST_X5),
    Rule("MaxPool", _window, f"{LIST_X5}; {MEASURED}"),
    Rule("ReduceMax", _row_maximum, MEASURED),
)
STEPS = f"{MEASURED}: a 192-wide pair of 1 x 1 convolutions takes steps at multiples of 8 between 512 and 544 hidden channels"


def _table(rules: tuple[Rule, ...], listed: frozenset[str], list_source: str, width: tuple[int, str]) -> Table:
    return Table(
        opsets=(10, 11),
        opset_source=MEASURED,
        width_multiple=width[0],
        width_source=width[1],
        rules=rules,
        listed=listed,
        list_source=list_source,
        output_rank=4,
        output_source=MEASURED,
    )


X3_RULES = (*COMMON, Rule("Conv", _conv_x3, LIST_X3), Rule("MatMul", _product_x3, LIST_X3))
TABLES = {
    "bayes-e": _table(BOTH_BAYES, EVERYWHERE | BAYES | BAYES_E, LIST_X5, (8, STEPS)),
    "bayes": _table(BOTH_BAYES, EVERYWHERE | BAYES, LIST_ULTRA, (8, f"{STEPS}, for bayes-e")),
    "bernoulli2": _table(X3_RULES, EVERYWHERE | {"PRelu"}, LIST_X3, (4, f"{LIST_X3}: 8W4C")),
}
