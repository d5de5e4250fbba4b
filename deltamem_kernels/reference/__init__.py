"""The specification in plain PyTorch: every op, one short file per family, any device, fp64 when everything given is.

Written to be read and trusted, not to be fast. The forward functions can be differentiated by autograd, which is what
the hand-written backward functions beside them are checked against.
"""
