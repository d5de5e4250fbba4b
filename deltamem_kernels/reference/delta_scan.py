"""The delta rule, token after token:

    reads_t = S_{t-1} q_t                                                             (read before the write)
    S_t     = diag(keep_t) S_{t-1} - diag(erase_t) (S_{t-1} k_t) k_t^T + diag(write_t) v_t k_t^T

    update_rule       keep    erase       write
    standard          lam     beta        beta
    lambda_outside    lam     lam beta    beta
    no_lambda         1       beta        beta

S [R, R] holds a value channel per row and a key channel per column. lam None couples the decay:
lam = 1 - beta. A masked token reads 0 and holds S. write=False: every token reads the initial state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import SEGMENT_LEN
from .precision import compute_dtype, widen, without_autocast
from .rows import from_rows, spans, to_rows

L2_EPS = 1e-6


class Steps(NamedTuple):
    """What the recurrence takes at every token of every row: [N, T, H, R]; the gates [N, T, H, R or 1]."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    beta: Tensor | None
    lam: Tensor | None
    valid: Tensor  # [N, T]


def activate(x: Tensor) -> Tensor:
    """y / max(|y|, eps), y = tanh(x)."""
    y = torch.tanh(x)
    return y / y.norm(dim=-1, keepdim=True).clamp_min(L2_EPS)


def activate_bwd(dz: Tensor, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    norm = y.norm(dim=-1, keepdim=True)
    along = torch.where(norm > L2_EPS, (y * dz).sum(-1, keepdim=True) / norm.clamp_min(L2_EPS) ** 2, 0)
    return (dz - y * along) / norm.clamp_min(L2_EPS) * (1 - y * y)


def gate(logit: Tensor, bias: Tensor | None) -> Tensor:
    return torch.sigmoid(logit if bias is None else logit + bias)


def gates(beta: Tensor, lam: Tensor | None, update_rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """(keep, erase, write) of the rule."""
    if update_rule == "no_lambda":
        return torch.ones_like(beta), beta, beta
    lam = 1 - beta if lam is None else lam
    return lam, lam * beta if update_rule == "lambda_outside" else beta, beta


def gates_bwd(
    dkeep: Tensor, derase: Tensor, dwrite: Tensor, beta: Tensor, lam: Tensor | None, update_rule: str
) -> tuple[Tensor, Tensor]:
    """(dbeta, dlam) [N, T, H, R]; of a coupled decay, dbeta is the total derivative."""
    if update_rule == "no_lambda":
        return derase + dwrite, torch.zeros_like(dkeep)
    decay = 1 - beta if lam is None else lam
    if update_rule == "lambda_outside":
        dbeta, dlam = derase * decay + dwrite, dkeep + derase * beta
    else:
        dbeta, dlam = derase + dwrite, dkeep
    return dbeta - dlam if lam is None else dbeta, dlam


def clean_rows(x: Tensor | None, valid: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x as rows [N, T, ...] in the arithmetic's dtype; what masked tokens hold (NaN, even) is 0."""
    if x is None:
        return None
    x = to_rows(x, cu_seqlens).to(dtype)
    return x.masked_fill(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)


def valid_rows(mem_q: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """bool [N, T]: a token that reads and writes."""
    if token_mask is None:
        token_mask = torch.ones(mem_q.shape[:2], dtype=torch.bool, device=mem_q.device)
    return to_rows(token_mask, cu_seqlens)


def take_steps(
    tokens: tuple[Tensor | None, ...],
    valid: Tensor,
    cu_seqlens: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    activation: bool,
    gated: bool,
    dtype: torch.dtype,
) -> tuple[Steps, Steps]:
    """The tokens (mem_q, mem_k, mem_v, beta, lam) as given, and with the activations left to the op."""
    raw = Steps(*(clean_rows(x, valid, cu_seqlens, dtype) for x in tokens), valid)
    q, k, v, beta, lam, _ = raw
    beta_bias, lam_bias = widen(dtype, *biases)
    if activation:
        q, k = activate(q), None if k is None else activate(k)
    if gated:
        beta = None if beta is None else gate(beta, beta_bias)
        lam = None if lam is None else gate(lam, lam_bias)
    return raw, Steps(q, k, v, beta, lam, valid)


def read(state: Tensor, x: Tensor) -> Tensor:
    """S x: [N, H, R, R], [N, H, R] -> [N, H, R]."""
    return (state @ x[..., None])[..., 0]


def update(state: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor) -> Tensor:
    """S_{t-1} -> S_t."""
    return keep[..., None] * state + (write * v - erase * read(state, k))[..., None] * k[..., None, :]


def advance(steps: Steps, state: Tensor, update_rule: str, write: bool):
    """Yields (reads_t [N, H, R], S_{t-1}, S_t) for each token."""
    token_gates = gates(steps.beta, steps.lam, update_rule) if write else ()
    for t in range(steps.q.shape[1]):
        valid = steps.valid[:, t, None, None]
        reads = torch.where(valid, read(state, steps.q[:, t]), 0)
        after = state
        if write:
            after = update(state, steps.k[:, t], steps.v[:, t], *(g[:, t] for g in token_gates))
            after = torch.where(valid[..., None], after, state)
        yield reads, state, after
        state = after


def start_state(initial_state: Tensor | None, q: Tensor) -> Tensor:
    """[N, H, R, R] that the caller's tensor does not share; q [N, T, H, R]."""
    rows, _, heads, rank = q.shape
    if initial_state is None:
        return q.new_zeros(rows, heads, rank, rank)
    return initial_state.to(q.dtype).clone(memory_format=torch.contiguous_format)


def tape_slots(
    batch: int, tokens: int, cu_seqlens: Tensor | None, segment_len: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Segment s of row n: its place on the tape, whether it exists (both [N, S]); the tape's length."""
    found = spans(batch, tokens, cu_seqlens)
    count = [-(-span.length // segment_len) for span in found]
    if cu_seqlens is None:
        first, total = [n * c for n, c in enumerate(count)], sum(count)
    else:
        first, total = (
            [span.start // segment_len + span.row for span in found],
            tokens // segment_len + len(found),
        )
    segment = torch.arange(max(count, default=0), device=device)
    used = segment < torch.tensor(count, dtype=torch.int64, device=device)[:, None]
    return torch.tensor(first, dtype=torch.int64, device=device)[:, None] + segment, used, total


@without_autocast
def delta_scan_fwd(
    mem_q: Tensor,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    beta: Tensor | None,
    lam: Tensor | None,
    initial_state: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta_bias: Tensor | None,
    lam_bias: Tensor | None,
    update_rule: str,
    write: bool,
    use_qk_activation_in_kernel: bool,
    use_gate_in_kernel: bool,
    segment_len: int,
    save_tape: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """reads [B, T, H, R]; final_state [N, H, R, R]; tape [S, H, R, R], the segments' start states."""
    tokens = (mem_q, mem_k, mem_v, beta, lam)
    dtype = compute_dtype(*tokens, initial_state, beta_bias, lam_bias)
    segment_len = segment_len or SEGMENT_LEN
    valid = valid_rows(mem_q, token_mask, cu_seqlens)
    options = ((beta_bias, lam_bias), use_qk_activation_in_kernel, use_gate_in_kernel, dtype)
    _, steps = take_steps(tokens, valid, cu_seqlens, *options)

    state = start_state(initial_state, steps.q)
    reads, starts = [], []
    for t, (read_t, before, after) in enumerate(advance(steps, state, update_rule, write)):
        if t % segment_len == 0:
            starts.append(before)
        reads.append(read_t)
        state = after
    reads = torch.stack(reads, 1) if reads else steps.q.new_zeros(steps.q.shape)

    tape = state.new_empty(0)
    if save_tape:
        slots, used, total = tape_slots(*mem_q.shape[:2], cu_seqlens, segment_len, mem_q.device)
        tape = state.new_zeros(total, *state.shape[1:])
        if starts and slots.numel():
            tape[slots[used]] = torch.stack(starts, 1).detach()[used]
    return from_rows(reads, cu_seqlens, mem_q.shape[1]), state.contiguous(), tape


def reverse_segment(dstate: Tensor, dreads: Tensor, steps: Steps, first: int, states: list[Tensor], token_gates, grads):
    """Takes dS from the end of a segment to its start and fills grads at its tokens.

    Per row i of S, with s = s_{t-1,i}, g = dS_t,i, a = s.k_t, h = g.k_t:
        dkeep = g.s      derase = -a h      dwrite = v h      dv = write h      dq = sum_i dr_i s
        dk    = sum_i (write v - erase a) g - erase h s
        g_{t-1} = keep g - erase h k_t + dr q_t
    """
    keep, erase, write = token_gates
    for offset in reversed(range(len(states))):
        t, state = first + offset, states[offset]
        q, k, v, dr = steps.q[:, t], steps.k[:, t], steps.v[:, t], dreads[:, t]
        a, h = read(state, k), read(dstate, k)
        values = {
            "q": read(state.mT, dr),
            "k": read(dstate.mT, write[:, t] * v - erase[:, t] * a) - read(state.mT, erase[:, t] * h),
            "v": write[:, t] * h,
            "keep": (dstate * state).sum(-1),
            "erase": -a * h,
            "write": v * h,
        }
        before = keep[:, t, :, :, None] * dstate - (erase[:, t] * h)[..., None] * k[..., None, :]
        before = before + dr[..., None] * q[..., None, :]
        valid = steps.valid[:, t, None, None]
        for name, value in values.items():
            grads[name][:, t] = torch.where(valid, value, 0)
        dstate = torch.where(valid[..., None], before, dstate)
    return dstate


def reverse(dstate: Tensor, dreads: Tensor, steps: Steps, starts: Tensor, segment_len: int, update_rule: str):
    """All segments from last to first, each replayed from its start state in starts [N, S, H, R, R]."""
    grads = {name: torch.zeros_like(steps.q) for name in ("q", "k", "v", "keep", "erase", "write")}
    token_gates = gates(steps.beta, steps.lam, update_rule)
    for s in reversed(range(starts.shape[1])):
        first = s * segment_len
        segment = Steps(*(None if x is None else x[:, first : first + segment_len] for x in steps))
        states = [before for _, before, _ in advance(segment, starts[:, s], update_rule, True)]
        dstate = reverse_segment(dstate, dreads, steps, first, states, token_gates, grads)
    dbeta, dlam = gates_bwd(grads["keep"], grads["erase"], grads["write"], steps.beta, steps.lam, update_rule)
    return grads["q"], grads["k"], grads["v"], dbeta, dlam, dstate


def reverse_read_only(dstate: Tensor, dreads: Tensor, q: Tensor, state: Tensor):
    """(dq, dS) of reads = S q with one S for all tokens."""
    dq = torch.einsum("nthi,nhij->nthj", dreads, state)
    return dq, dstate + torch.einsum("nthi,nthj->nhij", dreads, q)


def gate_logit_bwd(
    dgate: Tensor, value: Tensor | None, bias: Tensor | None, gated: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the gate as given and of its bias, from that of the gate in use, dgate [N, T, H, R]."""
    if value is None:
        return None, None if bias is None else torch.zeros_like(bias)
    if value.shape[-1] == 1:
        dgate = dgate.sum(-1, keepdim=True)
    if gated:
        dgate = dgate * value * (1 - value)
    return dgate, None if bias is None else dgate.sum((0, 1)) if gated else torch.zeros_like(bias)


@without_autocast
def delta_scan_bwd(
    dreads: Tensor | None,
    dfinal_state: Tensor | None,
    mem_q: Tensor,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    beta: Tensor | None,
    lam: Tensor | None,
    initial_state: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta_bias: Tensor | None,
    lam_bias: Tensor | None,
    update_rule: str,
    write: bool,
    use_qk_activation_in_kernel: bool,
    use_gate_in_kernel: bool,
    segment_len: int,
    tape: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of mem_q, mem_k, mem_v, beta, lam, initial_state, beta_bias, lam_bias, all as given."""
    tokens = (mem_q, mem_k, mem_v, beta, lam)
    dtype = compute_dtype(*tokens, initial_state, beta_bias, lam_bias)
    segment_len = segment_len or SEGMENT_LEN
    valid = valid_rows(mem_q, token_mask, cu_seqlens)
    options = ((beta_bias, lam_bias), use_qk_activation_in_kernel, use_gate_in_kernel, dtype)
    raw, steps = take_steps(tokens, valid, cu_seqlens, *options)
    dr = torch.zeros_like(steps.q) if dreads is None else clean_rows(dreads, valid, cu_seqlens, dtype)
    dstate = start_state(dfinal_state, steps.q)

    if write:
        slots, used, _ = tape_slots(*mem_q.shape[:2], cu_seqlens, segment_len, mem_q.device)
        starts = dstate.new_zeros(*slots.shape, *dstate.shape[1:])
        starts[used] = tape[slots[used]].to(dtype)
        dq, dk, dv, dbeta, dlam, dstate = reverse(dstate, dr, steps, starts, segment_len, update_rule)
    else:
        dq, dstate = reverse_read_only(dstate, dr, steps.q, start_state(initial_state, steps.q))
        dk, dv, dbeta, dlam = (torch.zeros_like(dq) for _ in range(4))

    if use_qk_activation_in_kernel:
        dq = activate_bwd(dq, raw.q)
        dk = dk if raw.k is None else activate_bwd(dk, raw.k)
    dbeta, dbeta_bias = gate_logit_bwd(dbeta, steps.beta, beta_bias, use_gate_in_kernel)
    dlam, dlam_bias = gate_logit_bwd(dlam, steps.lam, lam_bias, use_gate_in_kernel)

    def result(grad: Tensor | None, given: Tensor | None, per_token: bool) -> Tensor:
        if given is None:
            return mem_q.new_empty(0)
        grad = from_rows(grad, cu_seqlens, mem_q.shape[1]) if per_token else grad
        return grad.to(given.dtype).contiguous()

    per_token = zip((dq, dk, dv, dbeta, dlam), tokens, strict=True)
    whole = zip((dstate, dbeta_bias, dlam_bias), (initial_state, beta_bias, lam_bias), strict=True)
    return (*(result(*pair, True) for pair in per_token), *(result(*pair, False) for pair in whole))


@without_autocast
@torch.no_grad()
def delta_scan_with_state_pool(
    mem_q: Tensor,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    beta: Tensor | None,
    lam: Tensor | None,
    state_pool: Tensor,
    state_indices: Tensor | None,
    output_state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta_bias: Tensor | None,
    lam_bias: Tensor | None,
    update_rule: str,
    write: bool,
    use_qk_activation_in_kernel: bool,
    use_gate_in_kernel: bool,
    reads: Tensor,
) -> None:
    """Advances each row's slot of state_pool [P, H, R, R] and fills reads [B, T, H, R].

    output_state_indices: [N] the slots of the final states (default: state_indices), or [B, T] those of
    the state after each token. An index < 0 stores nothing; a row whose state index is < 0 is padding.
    """
    tokens = (mem_q, mem_k, mem_v, beta, lam)
    dtype = compute_dtype(*tokens, state_pool, beta_bias, lam_bias)
    valid = valid_rows(mem_q, token_mask, cu_seqlens)
    rows = torch.arange(valid.shape[0], device=mem_q.device)
    source = rows if state_indices is None else state_indices.long()
    active = source >= 0
    valid = valid & active[:, None]
    options = ((beta_bias, lam_bias), use_qk_activation_in_kernel, use_gate_in_kernel, dtype)
    _, steps = take_steps(tokens, valid, cu_seqlens, *options)

    loaded = active if has_initial_state is None else active & has_initial_state
    state = start_state(None, steps.q)
    state[loaded] = state_pool[source[loaded]].to(dtype)

    target = source if output_state_indices is None else output_state_indices.long()
    each_token = target.dim() == 2
    if each_token:  # rows that have ended store nothing
        target = to_rows(target + 1, cu_seqlens) - 1

    def store(slots: Tensor, states: Tensor) -> None:
        kept = active & (slots >= 0)
        state_pool[slots[kept]] = states[kept].to(state_pool.dtype)

    read_rows = torch.zeros_like(steps.q)
    for t, (read_t, _, after) in enumerate(advance(steps, state, update_rule, write)):
        read_rows[:, t] = read_t
        state = after
        if each_token:
            store(target[:, t], state)
    if not each_token:
        store(target, state)
    reads.copy_(from_rows(read_rows, cu_seqlens, mem_q.shape[1]))
