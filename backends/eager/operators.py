"""The operators an eager artifact may name. A graph file with any other is refused.

Only operators that compute on tensors are here: nothing that reads files, prints or runs code.
"""

from __future__ import annotations

_ATEN = """
abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d add add_ addbmm addcdiv addcmul addmm addmv alias all alpha_dropout amax
amin aminmax and any arange argmax argmin argsort as_strided asin asinh atan atan2 atanh
avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bernoulli bilinear binary_cross_entropy
bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm
broadcast_tensors broadcast_to bucketize cat cdist ceil celu channel_shuffle chunk clamp clamp_
clamp_max clamp_min clone constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution copy copy_ copysign cos cosh cosine_similarity
cross_entropy_loss cummax cummin cumprod cumsum detach detach_ diag diag_embed diagonal diff
div div_ dot dropout dropout_ einsum elu elu_ embedding embedding_bag empty empty_like eq erf
erfc erfinv exp exp2 expand expand_as expm1 eye fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2
fft_ifftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn feature_dropout fill
fill_ flatten flip floor floor_divide fmod frac full full_like gather ge gelu glu grid_sampler
group_norm gru gt hamming_window hann_window hardsigmoid hardswish hardswish_ hardtanh
hardtanh_ histc huber_loss im2col index index_add index_copy index_fill index_put index_put_
index_select instance_norm inverse is_nonzero isfinite isinf isnan item kl_div kthvalue
layer_norm le leaky_relu leaky_relu_ lerp lift_fresh_copy linalg_cholesky linalg_inv
linalg_norm linalg_solve linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid
log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lstm lt
masked_fill masked_fill_ masked_scatter masked_select matmul max max_pool1d max_pool2d
max_pool3d maximum mean median meshgrid min minimum mish mm movedim mse_loss mul mul_
multinomial mv nan_to_num narrow native_batch_norm native_group_norm native_layer_norm ne neg
new_empty new_full new_ones new_zeros nll_loss nonzero norm normal numpy_T one_hot ones
ones_like or outer pad permute pixel_shuffle pixel_unshuffle polar pow prelu prod quantile rand
rand_like randint randn randn_like randperm real reciprocal reflection_pad1d reflection_pad2d
relu relu6 relu_ remainder repeat repeat_interleave replication_pad1d replication_pad2d reshape
rms_norm rnn_relu rnn_tanh roll rot90 round rsqrt rsub scalar_tensor
scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select
select_scatter selu sigmoid sigmoid_ sign silu silu_ sin sinc sinh slice slice_scatter
smooth_l1_loss softmax softplus sort split split_with_sizes sqrt square squeeze stack std sub
sub_ sum swapaxes sym_size sym_stride sym_numel t take take_along_dim tan tanh tanh_ tensor_split
threshold tile to topk trace transpose tril tril_indices triu triu_indices true_divide trunc
type_as unbind unflatten unfold unique unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_trilinear3d var var_mean vector_norm view view_as view_as_complex view_as_real where
xor zero_ zeros zeros_like _to_copy _softmax _log_softmax _unsafe_view _reshape_alias __and__
__or__ __xor__ __lshift__ __rshift__ rrelu silu_backward _assert_tensor_metadata
_assert_async _assert_scalar sym_constrain_range sym_constrain_range_for_size
"""

_PYTHON = """
_operator.getitem _operator.add _operator.sub _operator.mul _operator.floordiv
_operator.truediv _operator.mod _operator.neg _operator.pow _operator.eq _operator.ne
_operator.lt _operator.le _operator.gt _operator.ge _operator.and_ _operator.or_
_operator.not_ math.ceil math.floor math.trunc math.sqrt torch.sym_max torch.sym_min
torch.sym_int torch.sym_float torch.sym_not torch.sym_ite torch.sym_sum torch._sym_sqrt
"""

ATEN = frozenset(_ATEN.split())
PYTHON = frozenset(_PYTHON.split())
