"""What Triton's interpreter does otherwise than a GPU, put right: its results are held to a GPU's budget."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _converted(convert):
    """fp32 to bf16 rounds to nearest even (cvt.rn.bf16.f32), where the interpreter cuts bits off, so errs by up to a
    whole unit; bf16 to fp32 is exact, where the interpreter changes subnormals."""

    def converted(x, source, target, mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, nearest).astype(np.uint16)

    return converted


def _splat(builder, block, scalar):
    """Of the block's type. 3.9 takes that of the operands for a comparison's, so a mask & (i == 0) are no masks."""
    value = np.full(block.shape, scalar.data.reshape(-1)[0], dtype=interpreter._get_np_dtype(block.scalar))
    return interpreter.TensorHandle(value, block.scalar)


def _indexed(patch):
    """A size-one tensor serves as an index: 3.6 asks numpy for what it refuses from 2.4 on."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def as_a_gpu():
    interpreter._convert_float = _converted(interpreter._convert_float)
    interpreter.InterpreterBuilder.create_splat = _splat
    interpreter._patch_lang_tensor = _indexed(interpreter._patch_lang_tensor)
