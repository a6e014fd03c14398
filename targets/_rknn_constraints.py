"""What Rockchip's compiler leaves to the CPU, per chip: all of it found by compiling with rknn-toolkit2 2.5.0.

The vendor's list of operators is not public text, so an operation that no rule names is one that nothing is known against.
"""

from __future__ import annotations

from targets._constraints import Op, Rule, Table

__all__ = ["TABLES"]

MEASURED = "measured with rknn-toolkit2 2.5.0"


def _negative_power(op: Op) -> str:
    exponent = op.values[1] if len(op.values) > 1 else None
    if exponent is None or exponent.size != 1 or float(exponent.reshape(-1)[0]) >= 0:
        return ""
    return f"a power must not be negative, got {float(exponent.reshape(-1)[0]):g}"


def _softmax(op: Op) -> str:
    del op  # Unused: every one was
    return "a softmax runs on the CPU, with a reshape and a transpose of the values beside it"


def _columns(op: Op) -> str:
    """The patch form "columns": a (1, h, w, in) image reshaped to (1, h, w / n, n in), and transposed behind it."""
    (before, *_), (after, *_) = op.inputs, op.outputs
    moved = len(before) == len(after) == 4 and before[:2] == after[:2] and before[3] < after[3]
    return "an image with channels last is reshaped on the CPU, and transposed there" if moved else ""


def _table(*rules: Rule) -> Table:
    return Table(
        opsets=(0, 19),
        opset_source=MEASURED,
        width_multiple=32,
        width_source=f"{MEASURED}, rk3588: the cycles of a 192-wide pair of 1 x 1 convolutions step at 512, 544 and 576 channels",
        rules=(Rule("Pow", _negative_power, MEASURED), *rules),
        output_rank=4,
        output_source=MEASURED,
    )


PLAIN = _table()
SMALL = _table(Rule("Softmax", _softmax, MEASURED), Rule("Reshape", _columns, f"{MEASURED}, rk3568"))
TABLES = {"rk3588": PLAIN, "rk3576": PLAIN, "rk3562": PLAIN, "rk3568": SMALL, "rk3566": SMALL}
