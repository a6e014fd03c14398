"""Post-training quantization: grids, scale search, plan, simulation, compensation."""

from compressor.quantize.plan import QuantizeConfig, quantize
from compressor.quantize.simulate import simulate

__all__ = ["QuantizeConfig", "quantize", "simulate"]
