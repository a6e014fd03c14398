"""Post-training quantization: grids, scale search, plan, simulation, compensation.

What ``compress`` runs is `refine`, after `importance` and beside the table of `sensitivity`. `plan.quantize`,
`compensate`, and of `search` all but `golden`, are the plain and published methods it is measured against.
"""

from compressor.quantize.plan import QuantizeConfig, quantize
from compressor.quantize.simulate import simulate

__all__ = ["QuantizeConfig", "quantize", "simulate"]
