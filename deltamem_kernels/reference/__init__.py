"""The specification in plain PyTorch: every op, one short file per family, on any device, also in fp64.

Written to be read and trusted, not to be fast. Autograd can differentiate the forward functions; the
hand-written backward functions beside them are checked against that.
"""
