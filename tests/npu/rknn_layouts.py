"""Run by the Rockchip environment's own interpreter: the simulator fed as the host does (NCHW) and as a board is (NHWC)."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[2] / "targets" / "_rknn_worker.py"


def both(arguments, arrays):
    """Whether both give the same logits for each image, and what the second are like."""
    import numpy as np

    spec = importlib.util.spec_from_file_location("worker", FILE)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.load(arguments, {})
    (images,), (model,) = arrays.values(), worker._sessions
    nchw = [model.inference(inputs=[image[None]], data_format=["nchw"])[0] for image in images]
    nhwc = [model.inference(inputs=[np.ascontiguousarray(image[None].transpose(0, 2, 3, 1))])[0] for image in images]
    wrong = model.inference(inputs=[np.ascontiguousarray(images[:1, :, ::-1].transpose(0, 2, 3, 1))])[0]
    same, control = np.array_equal(nchw, nhwc), not np.array_equal(nchw[0], wrong)
    return {"same": bool(same), "control": bool(control), "dtype": str(nhwc[0].dtype), "shape": list(nhwc[0].shape)}, {}
