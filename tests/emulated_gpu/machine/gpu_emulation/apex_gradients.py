"""Apex's extension fused_weight_gradient_mlp_cuda in plain torch: adds a weight's gradient to an accumulated sum."""

from torch import Tensor


def _accumulate(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    """d_weight [out, in] += d_output [..., out]^T @ input [..., in], computed in fp32."""
    rows, grads = input.reshape(-1, input.shape[-1]), d_output.reshape(-1, d_output.shape[-1])
    d_weight.add_((grads.float().t() @ rows.float()).to(d_weight.dtype))


wgrad_gemm_accum_fp32 = _accumulate
wgrad_gemm_accum_fp16 = _accumulate
