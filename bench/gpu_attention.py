# SPDX-License-Identifier: Apache-2.0
"""pentad.attention on a CUDA device against torch's flash and cuDNN kernels.

    make bench-gpu

Operations are those of the products that a causal or full mask leaves: 4 Sq Sk D a head forward,
10 backward, half of it where causal.
"""

from gpu_harness import compare, matmul_rate, run

BATCH_TOKENS, WIDTH = 16384, 2048  # of each case: tokens in all, and heads * D


def operands(length, dim, dtype):
    import torch

    shape = BATCH_TOKENS // length, WIDTH // dim, length, dim
    return [
        torch.randn(shape, device="cuda").to(getattr(torch, dtype)).requires_grad_()
        for _ in range(3)
    ]


def sdpa(backend):
    def call(q, k, v, causal):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def pentad(q, k, v, causal):
    from pentad.attention import attention

    return attention(q, k, v, causal=causal)


def contender(function, given, upstream, want, causal, backward):
    import torch

    def prepare():
        def forward():
            with torch.no_grad():
                return (function(*given, causal),)

        if not backward:
            call = forward
        else:
            try:
                out = function(*given, causal)
            except RuntimeError as error:  # a backend that refuses these arguments
                raise AttributeError(str(error).split("\n")[0]) from None

            def call():
                return torch.autograd.grad(out, given, upstream, retain_graph=True)

        try:
            call()
        except RuntimeError as error:
            raise AttributeError(str(error).split("\n")[0]) from None
        return call, lambda got: all(
            (g.float() - w.float()).abs().max() <= 3e-2 * w.float().abs().max()
            for g, w in zip(got, want, strict=True)
        )

    return prepare


def on_hopper(prepare):
    """The contender by the kernels for sm_90a, which are asked for."""

    def prepared():
        from pentad import _C

        call, right = prepare()

        def asked():
            _C.attention_want_hopper(True)
            try:
                return call()
            finally:
                _C.attention_want_hopper(False)

        return asked, right

    return prepared


def case(length, dim, dtype, causal, backward):
    import torch

    given = operands(length, dim, dtype)
    out = sdpa("EFFICIENT_ATTENTION")(*given, causal)
    upstream = torch.randn_like(out)
    want = torch.autograd.grad(out, given, upstream) if backward else (out.detach(),)
    functions = {"pentad": pentad, "torch efficient": sdpa("EFFICIENT_ATTENTION")}
    if dtype != "float32":
        functions["torch flash"] = sdpa("FLASH_ATTENTION")
        functions["torch cuDNN"] = sdpa("CUDNN_ATTENTION")
    products = 2 * BATCH_TOKENS * length * WIDTH / (2 if causal else 1)
    way = "backward" if backward else "forward"
    contenders = {
        name: contender(function, given, upstream, want, causal, backward)
        for name, function in functions.items()
    }
    if dtype != "float32" and dim <= 128 and torch.cuda.get_device_capability() == (9, 0):
        contenders["pentad, sm_90a"] = on_hopper(contenders["pentad"])
    return compare(
        f"{way}, {dtype}, {length} tokens, D {dim}{', causal' if causal else ''}",
        "gradient_kernel" if backward else "forward_kernel",
        contenders,
        amount=products * (5 if backward else 2),
        unit="FLOP",
        ceiling=matmul_rate(dtype),
    )


def cases():
    sizes = [(length, dim) for length in (512, 2048, 8192, 16384) for dim in (64, 128)]
    return [
        *(
            case(length, dim, "bfloat16", causal, backward)
            for length, dim in sizes
            for causal in (False, True)
            for backward in (False, True)
        ),
        case(8192, 256, "bfloat16", True, False),
        case(8192, 256, "bfloat16", True, True),
        case(2048, 64, "float32", True, False),
        case(2048, 64, "float32", True, True),
    ]


if __name__ == "__main__":
    run("attention", cases)
