"""What Triton's interpreter does otherwise than a GPU, put right: its results are held to a GPU's budget."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_bf16_as_a_gpu():
    """fp32 to bf16 rounds to nearest even (cvt.rn.bf16.f32), where the interpreter cuts bits off, so errs by up to a
    whole unit; and bf16 to fp32 is exact, where the interpreter changes subnormals."""
    convert = interpreter._convert_float

    def converted(x, source, target, mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, nearest).astype(np.uint16)

    interpreter._convert_float = converted
