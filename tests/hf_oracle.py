"""δ-mem written out: hooks on an untouched model, a loop over tokens in fp64, nothing of the package's own."""

import copy

import torch
from torch.nn import functional as F

from deltamem_kernels import hf


class Oracle:
    """A copy of an attached model without its attachment, run by the plain formulas.

    ``oracle(ids, ...)`` -> logits; ``oracle.states``: each layer's state after the call.
    """

    def __init__(self, model):
        record = model._delta_mem
        self.config = record.config
        self.parameters = {
            name: {leaf: p.detach() for leaf, p in module.delta_mem.named_parameters()}
            for name, module in record.attentions.items()
        }
        self.model = hf.detach(copy.deepcopy(model))

    def __call__(self, ids, token_mask=None, states=None, write=True, segments=None, **kwargs):
        self.states = {}
        handles = []
        for i, (name, p) in enumerate(self.parameters.items()):
            module = self.model.get_submodule(name)
            start = None if states is None else states[i]
            memory = _LayerOracle(self.config, p, start, token_mask, write, segments)
            handles.append(module.register_forward_pre_hook(memory.read, with_kwargs=True))
            for x in "qkvo":
                handles.append(getattr(module, f"{x}_proj").register_forward_hook(memory.correct(x)))
            self.states[name] = memory
        try:
            logits = self.model(ids, use_cache=False, **kwargs).logits
        finally:
            for handle in handles:
                handle.remove()
        self.states = [memory.state.float() for memory in self.states.values()]
        return logits


class _LayerOracle:
    def __init__(self, config, parameters, state, token_mask, write, segments):
        self.config, self.p, self.state = config, parameters, state
        self.token_mask, self.write, self.segments = token_mask, write, segments

    def _projected(self, x):
        """mem_q, mem_k, mem_v [..., H, R], keep, erase, write [..., H, R] of hidden states x [..., hidden], fp64."""
        c, p = self.config, {name: w.double() for name, w in self.p.items()}
        heads = (*x.shape[:-1], c.num_state_heads, -1)
        mem_q, mem_k, mem_v = ((x @ p[f"memory_{n}_proj"].T).view(heads) for n in "qkv")
        if c.normalize_qk:
            mem_q, mem_k = (F.normalize(y.tanh(), dim=-1, eps=1e-6) for y in (mem_q, mem_k))
        beta = (x @ p["beta_proj"].T + p["beta_bias"]).sigmoid().view(heads)
        lam = 1 - beta if c.couple_lambda else (x @ p["lambda_proj"].T + p["lambda_bias"]).sigmoid().view(heads)
        keep, erase = {
            "standard": (lam, beta),
            "lambda_outside": (lam, lam * beta),
            "no_lambda": (torch.ones_like(beta), beta),
        }[c.state_update_mode]
        return mem_q, mem_k, mem_v, keep, erase, beta

    def read(self, module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).double()
        B, T, _ = x.shape
        H, R = self.config.num_state_heads, self.config.rank
        S = torch.zeros(B, H, R, R, dtype=torch.double) if self.state is None else self.state.double()
        valid = torch.ones(B, T, dtype=torch.bool) if self.token_mask is None else self.token_mask
        projected = self._projected(x)
        reads = torch.zeros(B, T, H, R, dtype=torch.double)
        tokenwise = self.write and self.segments is None
        for b in range(B):
            for t in range(T):
                if not valid[b, t]:
                    continue
                q, k, v, keep, erase, write = (y[b, t] for y in projected)
                reads[b, t] = torch.einsum("hij,hj->hi", S[b], q)
                if tokenwise:
                    S[b] = _written(S[b], k, v, keep, erase, write)
            if self.write and self.segments is not None:
                ids = self.segments[b].masked_fill(~valid[b], -1)
                for m in sorted(set(ids[ids >= 0].tolist())):
                    _, k, v, keep, erase, write = self._projected(x[b, ids == m].mean(0))
                    S[b] = _written(S[b], k, v, keep, erase, write)
        self.state, self.reads = S, reads.flatten(2)

    def correct(self, head):
        def hook(module, args, out):
            c = self.config
            if head not in c.delta_heads:
                return None
            scale = c.alpha / c.rank
            if c.trainable_delta_scale:
                raw = self.p["delta_scale_raw"].double()
                scale = scale * c.delta_scale_max * raw["qkvo".index(head) if raw.numel() > 1 else 0].sigmoid()
            delta = scale * (self.reads @ self.p[f"delta_{head}_proj"].double().T)
            if head == "o" and c.delta_o_rmsnorm:
                delta = delta * (delta.square().mean(-1, keepdim=True) + c.delta_o_rmsnorm_eps).rsqrt()
                delta = delta * self.p["delta_o_rmsnorm_weight"].double()
            return (out.double() + delta.view(out.shape)).to(out.dtype)

        return hook


def _written(S, k, v, keep, erase, write):
    predicted = torch.einsum("hij,hj->hi", S, k)
    return keep[..., None] * S + (write * v - erase * predicted)[..., None] * k[..., None, :]
