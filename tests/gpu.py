# SPDX-License-Identifier: Apache-2.0
"""What the tests of CUDA kernels share: whether there is a device, ways to it, and common checks.

A tests/test_gpu_<family>.py has ``pytestmark = needs_gpu`` and, of every function with kernels,

- tests whose names begin with ``test_same_results``: every option and layout against the CPU, at
  small sizes. `make test-gpu` runs these, by ``-k same_results``, once more under each tool of
  compute-sanitizer, which takes ten to fifty times as long: nothing large goes by that name;
- larger sizes, and calls of the checks below, by other names.

A check takes a call and its arguments on the CPU: tensors, numpy arrays, and tuples, lists or dicts
with those in them, beside what stays as it is. Tolerances are those of
`torch.testing.assert_close`; integers are always compared exactly.
"""

import numpy as np
import pytest

import pentad

try:
    import torch

    DEVICES = torch.cuda.device_count()
except ImportError:
    DEVICES = 0

if not pentad._C.cuda_built():
    _missing = "this build of pentad has no CUDA kernels"
elif not DEVICES:
    _missing = "torch sees no CUDA device"
else:
    _missing = ""
needs_gpu = pytest.mark.skipif(bool(_missing), reason=_missing)
needs_two_gpus = pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")


# --- Ways to the device and back ------------------------------------------------------------------


def each(change, value):
    """`value` with `change` applied to the tensors and arrays in it."""
    if isinstance(value, dict):
        return {key: each(change, part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [each(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(value) if isinstance(value, (np.ndarray, torch.Tensor)) else value


def tensors_in(value):
    found = []
    each(found.append, value)
    return found


def here(value):
    """Tensors on the CPU, of tensors and arrays."""
    return each(lambda x: x.detach().cpu() if isinstance(x, torch.Tensor) else _tensor(x), value)


def on_gpu(value, device=0):
    """Tensors on the device, with their strides as far as torch has them."""

    def moved(x):
        x = _tensor(x) if isinstance(x, np.ndarray) else x.detach()
        flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(f"cuda:{device}")
        return flat.as_strided(x.shape, x.stride(), x.storage_offset())

    return each(moved, value)


def _tensor(array):
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    return torch.from_numpy(array)


def to_numpy(result):
    return each(lambda x: x.cpu().numpy() if isinstance(x, torch.Tensor) else x, result)


# --- Checks ---------------------------------------------------------------------------------------


def assert_equal(got, want, **tolerance):
    """The same tensors, wherever they are."""
    got, want = tensors_in(here(got)), tensors_in(here(want))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(
            g, w, equal_nan=True, **(tolerance if w.is_floating_point() else {})
        )


def check_results(call, inputs, **tolerance):
    """The device's results are the CPU's."""
    assert_equal(call(*on_gpu(inputs)), call(*here(inputs)), **tolerance)


def check_gradients(call, inputs, **tolerance):
    """So are the gradients of every floating-point tensor among the inputs."""

    def gradients(arguments):
        leaves = [x.requires_grad_() for x in tensors_in(arguments) if x.is_floating_point()]
        outputs = [y for y in tensors_in(call(*arguments)) if y.requires_grad]
        draw = torch.Generator().manual_seed(0)
        given = [torch.randn(y.shape, generator=draw).to(y) for y in outputs]
        found = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        return [x is not None for x in found], [x for x in found if x is not None]

    cpu = each(lambda x: x.clone(), here(inputs))
    (there, got), (known, want) = gradients(on_gpu(inputs)), gradients(cpu)
    assert there == known
    assert_equal(got, want, **tolerance)


def check_repeats(call, inputs, times=5):
    """The same bits every time."""
    there = on_gpu(inputs)
    first = tensors_in(call(*there))
    for _ in range(times):
        again = tensors_in(call(*there))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def check_streams(call, first, second, **tolerance):
    """On a stream of its own a kernel waits for what makes its input; on two, they do not mix.

    `first` and `second` are inputs of the same shapes.
    """
    streams = [torch.cuda.Stream() for _ in range(2)]
    there = [on_gpu(inputs) for inputs in (first, second)]
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                late = each(lambda x: x.clone(), there[1 - i])
                torch.cuda._sleep(20_000_000)
                _copy(there[i], late)
                results.append((i, call(*late)))
    torch.cuda.synchronize()
    want = [call(*here(inputs)) for inputs in (first, second)]
    for i, got in results:
        assert_equal(got, want[i], **tolerance)


def check_captured(call, first, second, **tolerance):
    """Captured in a graph with `first`, replayed on `second`, of the same shapes."""
    static = each(lambda x: x.clone(), on_gpu(first))
    call(*static)  # outside first: modules are loaded at the first launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*static)
    _copy(on_gpu(second), static)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(got, call(*here(second)), **tolerance)


def check_two_devices(call, inputs, **tolerance):
    """On each device, whichever is the current one. For `needs_two_gpus`."""
    current = torch.cuda.current_device()
    want = call(*here(inputs))
    for device in range(2):
        got = call(*on_gpu(inputs, device))
        assert {x.device.index for x in tensors_in(got)} == {device}
        assert_equal(got, want, **tolerance)
        assert torch.cuda.current_device() == current


def check_mixed_devices(call, inputs):
    """Each tensor alone on the CPU, and where there are two devices on the other one: refused."""
    there = on_gpu(inputs)
    elsewhere = [here(inputs), *([on_gpu(inputs, 1)] if DEVICES > 1 else [])]
    for other in elsewhere:
        replacements = tensors_in(other)
        for odd in range(len(replacements)):
            order = iter(range(len(replacements)))
            mixed = each(lambda x: replacements[odd] if next(order) == odd else x, there)  # noqa: B023
            with pytest.raises(pentad.DeviceError):
                call(*mixed)


def _copy(source, target):
    for a, b in zip(tensors_in(source), tensors_in(target), strict=True):
        b.copy_(a)
