"""Run by the Rockchip environment's own interpreter: the simulator fed as the host does (NCHW) and as a board is (NHWC).

"last": what the toolkit counts as NCHW is (n, h, w, in).
"""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[2] / "targets" / "_rknn_worker.py"


def both(arguments, arrays):
    """Whether both give the same logits for each image, and what the second are like."""
    import numpy as np

    spec = importlib.util.spec_from_file_location("worker", FILE)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.load({"parts": arguments["parts"]}, {})
    (images,), (model,) = arrays.values(), worker._sessions
    if arguments["last"]:
        images = images.transpose(0, 2, 3, 1)
    board = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    wrong = np.ascontiguousarray(images[:1, :, ::-1].transpose(0, 2, 3, 1))
    host = [model.inference(inputs=[np.ascontiguousarray(image[None])], data_format=["nchw"])[0] for image in images]
    got = [model.inference(inputs=[image[None]])[0] for image in board]
    same, control = np.array_equal(host, got), not np.array_equal(host[0], model.inference(inputs=[wrong])[0])
    return {"same": bool(same), "control": bool(control), "dtype": str(got[0].dtype), "shape": list(got[0].shape)}, {}
