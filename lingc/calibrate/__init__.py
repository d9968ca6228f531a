"""Calibration: what sample data says about how weights and activations are best rounded."""
