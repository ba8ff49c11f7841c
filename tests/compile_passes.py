"""Compiles the passes for GPUs for cards of these compute capabilities (75, 80, …), a line each; no GPU is needed."""

import inspect
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cifarlab.probes import moments_triton as module
from cifarlab.probes.moments_torch import NUM_BINS

TYPES = {"sums": "*fp64", "out": "*fp64", "num_blocks": "i32", "is_over": "*i8"}  # all else are tables of int64
KERNELS = [
    (module.measure_gradients, {"copies": True, "block": module.BLOCK}, {}),
    (module.measure_gradients, {"copies": False, "block": module.BLOCK}, {}),
    (module.measure_weights, {"keeps": True, "block": module.BLOCK}, {}),
    (module.measure_weights, {"keeps": False, "block": module.BLOCK}, {}),
    (module.add_blocks, {"rows": module.Passes.rows}, {}),
    (module.copy_unless, {"block": module.BLOCK}, {}),
    (module.count_exponents, {"block": module.BLOCK, "bins": NUM_BINS}, {"out": "*i64"}),
]

for capability in map(int, sys.argv[1:]):
    for kernel, constants, types in KERNELS:
        signature = {name: "constexpr" if name in constants else (TYPES | types).get(name, "*i64") for name in kernel.arg_names}
        if "constexprs" in inspect.signature(ASTSource).parameters:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        else:  # triton 3.2
            given = {name: kind for name, kind in signature.items() if name not in constants}
            source = ASTSource(fn=kernel, signature=given, constants=constants)
        options = {} if kernel is module.add_blocks else {"num_warps": module.WARPS}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(capability, kernel.__name__, len(compiled.asm["cubin"]), "bytes")
