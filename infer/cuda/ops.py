"""The CUDA column of the op table: the same ten operations on device arrays.

Who owns what (all launchers take the `Device` first and return arrays of the step's arena, `device.empty`):

    array.py      DeviceArray: pointer, shape, dtype, row slices
    compile.py    CUDA C++ to a cubin by NVRTC, cached by source, flags, architecture
    device.py     Device: context, stream, memory, kernels, launches, graphs
    weight.py     DeviceWeight: one packed linear on the device
    gemm.py       pack(device, part), linear(device, a, w, ...)
    rows.py       embed, add_norm, quantize, silu_mul, rope_write, gather, argmax, logprobs, sample
    attention.py  attention(device, q, batch, cache, window)
    kernels/      *.cu and *.cuh, no CUDA header included: NVRTC's built-in types and inline PTX are enough

Dtypes: the residual stream is f32. Everything between operations (qkv, q, attention's output, gate_up, delta, an
activation's `values`) is `device.dtype`: float32, which follows the CPU runtime's arithmetic, or bfloat16, which is
faster where activations are large. Codes are int8 or e4m3 with f32 scales, logits are f32.
"""
