"""Post-training quantization: grids, scale search, plan, simulation, compensation."""
