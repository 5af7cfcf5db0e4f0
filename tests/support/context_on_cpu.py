"""Makes torch's context parallelism run on CPUs, so that tests can run it without a GPU.

torch divides the rows and computes ring attention by kernels of GPUs only. After :func:`allow`, its ring attention
gets the attention kernel of CPUs. Everything else is torch's own.
"""

from functools import partial

import torch
from torch.nn import functional as F

aten = torch.ops.aten


def allow() -> None:
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    whole = F.scaled_dot_product_attention

    def enable(seq_dim, mesh):
        assert mesh.device_type == "cpu" and seq_dim == 2

        def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            assert attn_mask is None and not dropout_p and is_causal
            if enable_gqa:
                k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
            return RingAttention.apply(q, k, v, mesh.get_group(), scale)

        F.scaled_dot_product_attention = attention

    def disable():
        F.scaled_dot_product_attention = whole

    ring._enable_context_parallel_dispatcher_impl = enable
    ring._disable_context_parallel_dispatcher_impl = disable


class RingAttention(torch.autograd.Function):
    """torch's ring attention with the kernel of CPUs."""

    @staticmethod
    def forward(ctx, q, k, v, group, scale):
        from torch.distributed.tensor.experimental._context_parallel import _attention as ring

        kernel = partial(aten._scaled_dot_product_flash_attention_for_cpu, dropout_p=0.0)
        out, logsumexp = ring._templated_ring_attention(group, 2, kernel, q, k, v, is_causal=True, scale=scale)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.group, ctx.scale = group, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        from torch.distributed.tensor.experimental._context_parallel import _attention as ring

        q, k, v, out, logsumexp = ctx.saved_tensors
        grads = ring._templated_ring_attention_backward(
            ctx.group,
            2,
            _backward,
            grad_out=grad,
            grad_out_name="grad_out",
            query=q,
            key=k,
            value=v,
            out=out,
            logsumexp=logsumexp,
            is_causal=True,
            scale=ctx.scale,
        )
        return (*grads[:3], None, None)


def _backward(grad_out, query, key, value, out, logsumexp, is_causal, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out.contiguous(), query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
    )
