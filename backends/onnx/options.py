"""How an ONNX Runtime session for our models is configured, as plain data.

Measured on ONNX Runtime 1.31, AVX-512 VNNI and AMX, with alternated fresh processes.
"""

from __future__ import annotations

# Passed one by one to ``SessionOptions.add_session_config_entry``.
SESSION_CONFIG = {
    # The fused kernel takes 235 us for 128 x 384 numbers, an addition and a LayerNormalization 27;
    # for the RMS form 35 against 16. Two milliseconds of 26 in a 6-layer BERT.
    "optimization.disable_specified_optimizers": "SkipLayerNormFusion",
    # Softmax leaves denormal numbers where a mask hides a token, and each costs a microcode assist
    # there and in the product with the values: 0.56 ms become 0.29 for 12 heads and 128 tokens.
    # ONNX Runtime sets this on its own threads and, with the first session of a process only, on
    # the calling thread; ``torch.set_flush_denormal`` around a call does it for the latter.
    "session.set_denormal_as_zero": "1",
}
# Left at their defaults on purpose: ``session.x64quantprecision`` (exact sums on CPUs without VNNI)
# refuses to load models in which two layers share a zero point, and its uint8 weights cost five
# times as much with AMX; weights of 7 bits are the way for such CPUs. Arena and prepacking: on.
