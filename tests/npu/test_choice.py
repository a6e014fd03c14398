"""Which of several quantizations of a network is kept; no compiler is needed."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.errors import ParityError
from compressor.lower import lower
from targets import _choice, bpu, rknn
from tests.npu.models import first_blocks, images, torch_logits


def test_the_smaller_divergence_is_kept():
    reference = np.random.default_rng(0).standard_normal((50, 10))
    near, far = reference + 0.01 * reference[::-1], reference + 0.5 * reference[::-1]
    assert 0 < _choice.divergences(reference, near).mean() < _choice.divergences(reference, far).mean()
    assert _choice.divergences(reference, reference + 3.0).max() < 1e-11  # a softmax does not see it
    chosen, told = _choice.best(reference, {"vendor": far, "vitrim": near})
    assert chosen == "vitrim" and "vendor: divergence" in told and "vitrim: divergence" in told
    assert _choice.best(reference, {"vendor": near, "vitrim": far})[0] == "vendor"


def test_a_quantized_model_with_other_classes_is_refused():
    """Judged by what so few images can say: 85 of 100 may be bad luck, 75 are not, nor 2 of 8; of 7 nothing is said."""

    def judged(count, same):
        reference = np.eye(10)[np.arange(count) % 10]
        ways = {"vendor": np.where(np.arange(count)[:, None] < same, reference, -reference)}
        return _choice.best(reference, ways)

    for count, same in ((100, 100), (100, 85), (64, 60), (8, 7), (7, 0)):
        assert judged(count, same)[0] == "vendor"
    for count, same in ((100, 75), (64, 45), (8, 2)):
        with pytest.raises(
            ParityError, match=f"at least 90% of the classes must be float's, got {same} of {count}"
        ) as caught:
            judged(count, same)
        assert "--calib-size" in caught.value.hint and caught.value.exit_code == 1


def test_what_takes_more_time_has_to_be_worth_it():
    """A divergence is about the square of an error: 0.8 of the error leaves 0.64 of it, 0.95 leaves 0.9, which is not enough.

    Control: few images say nothing, a better mean that hangs on one image neither, and at one price the lesser mean is kept.
    """
    rng = np.random.default_rng(0)
    reference, error = rng.standard_normal((64, 10)), rng.standard_normal((64, 10))

    def chosen(share, images=64, dear=("int16",)):
        ways = {"int8": reference + 0.1 * error, "int16": reference + 0.1 * np.reshape(share, (-1, 1)) * error}
        return _choice.best(reference[:images], {n: logits[:images] for n, logits in ways.items()}, dear)[0]

    assert chosen(0.8) == "int16" and chosen(0.95) == "int8" and chosen(1.1) == "int8"
    assert chosen(0.8, images=5) == "int8"
    one = np.where(np.arange(64) == 0, 0.0, 0.99)
    assert chosen(one) == "int8" and chosen(one, dear=()) == chosen(0.95, dear=()) == "int16"


@pytest.mark.parametrize("target", [bpu, rknn])
def test_the_residual_additions_are_those_between_the_blocks(target):
    """Of both layouts, and no addition of a bias, an epsilon or an error function; control: other names have none."""
    graph = lower(first_blocks(2), target.CAPABILITIES)
    ends = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
    assert _choice.residual_additions(graph) == ("tokens.add", *ends)
    assert sum(node.op_type == "Add" for node in graph.graph) > 5
    for node in graph.graph:
        node.outputs[0].name = f"other.{node.outputs[0].name}"
    assert _choice.residual_additions(graph) == ()


def test_float_logits_are_the_networks():
    model = first_blocks(1)
    x = images(model, 3)
    got = _choice.float_logits(lower(model, bpu.CAPABILITIES), x)
    assert got.shape == (3, 10) and np.abs(got - torch_logits(model, x)).max() < 1e-4
    assert np.abs(got[::-1] - torch_logits(model, x)).max() > 1e-2  # control
