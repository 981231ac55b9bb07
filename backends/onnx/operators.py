"""The ONNX operators a lowered model may consist of: what a checker of files from strangers allows.

The standard ones are those PyTorch's exporter can write for a model without random numbers,
strings, sequences or optional values; the contributed ones are those of our translations and
rewrites. A test lowers the zoo and looks each operator up here.
"""

from __future__ import annotations

_STANDARD = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool
BatchNormalization BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast
CastLike Ceil Celu Clip Col2Im Compress Concat Constant ConstantOfShape Conv ConvInteger
ConvTranspose Cos Cosh CumSum DFT DepthToSpace DequantizeLinear Det Div Dropout
DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
GatherElements GatherND Gelu Gemm Greater GreaterOrEqual GridSample GroupNormalization
HammingWindow HannWindow HardSigmoid HardSwish Identity If InstanceNormalization IsInf IsNaN
LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop MatMul Max MaxPool
MaxRoiPool Min Mish Mod Mul Neg NegativeLogLikelihoodLoss NonMaxSuppression NonZero Not Or
PRelu Pad Pow QLinearConv QuantizeLinear RMSNormalization RNN Range Reciprocal ReduceL1
ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape
Resize RoiAlign RotaryEmbedding Round STFT Scan ScatterElements ScatterND Selu Shape Sigmoid
Sign Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Split Sqrt Squeeze Sub Tan
Tanh Tile TopK Transpose Trilu Unique Unsqueeze Where Xor
"""

_CONTRIBUTED = """
DynamicQuantizeMatMul GroupQueryAttention MatMulIntegerToFloat MatMulNBits RotaryEmbedding
"""

# (domain, operator); the standard domain is the empty string.
OPERATORS: frozenset[tuple[str, str]] = frozenset(
    [("", name) for name in _STANDARD.split()]
    + [("com.microsoft", name) for name in _CONTRIBUTED.split()]
)
