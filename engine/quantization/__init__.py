"""Selective quantization: sensitivity, allocation of bits, quantizers, and the checkpoint they make."""
