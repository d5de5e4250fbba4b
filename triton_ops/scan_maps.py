"""The affine maps of segments, their products over groups of segments, and a state carried through them.

A segment of tokens takes row i of the state from s to s M_i + b_i. Its map is RP + 1 vectors that pass through
the same recurrence: the unit vectors, which become the rows of M_i, and 0 with the writes on, which becomes b_i.
Where all rows share their gates there is one M per head, and lane i carries unit vector i beside its b_i.

The reverse pass takes g = dS through the same symmetric token maps in the opposite order, with dr q in place
of write v k: the same kernels, REVERSE.

A buffer holds the maps of the segments, then of groups of G1 segments, then of groups of G2 groups. Groups never
cross sequences: they are segments of G1 L tokens, found by the same rule. A lane then starts its segment from
at most G2 - 1 groups and G1 - 1 segments behind the whole supergroups before it: a fixed tree, so a result's
bits depend on the sequence alone.
"""

import triton
import triton.language as tl

from .common import axpby, dot, load_columns, store_columns, where_columns, widen, zero_columns
from .scan_tokens import (
    blank,
    blank_columns,
    first_slot,
    is_live,
    lane_of,
    load_bias,
    load_gates,
    load_value,
    load_vector,
    open_gates,
    segment_of,
    terms,
)


@triton.jit
def map_offset(slot, H, h, row, RP: tl.constexpr, SHARED: tl.constexpr):
    """Of M in maps [slots, H, RP (1 if shared), RP, RP]."""
    if SHARED:
        return (slot * H + h) * (RP * RP)
    else:
        return ((slot * H + h) * RP + row) * (RP * RP)


@triton.jit
def bias_offset(slot, H, h, row, RP: tl.constexpr):
    """Of b in biases [slots, H, RP, RP]."""
    return ((slot * H + h) * RP + row) * RP


@triton.jit
def zero_map(row, RP: tl.constexpr):
    """As fetch_map's, of no map."""
    if RP > 8:
        return ()
    else:
        return zero_columns(row, RP * RP)


@triton.jit
def fetch_map(maps, biases, slot, H, h, row, live, RP: tl.constexpr, SHARED: tl.constexpr, WM: tl.constexpr):
    """(M, b) into registers, ahead of their use; b alone where M is too large for that."""
    b = load_columns(biases, bias_offset(slot, H, h, row, RP), live, 0, RP, RP, WM)
    if RP > 8:
        return (), b
    else:
        return load_columns(maps, map_offset(slot, H, h, row, RP, SHARED), live, 0, RP * RP, RP * RP, WM), b


@triton.jit
def apply_map(x, m, b, with_bias, maps, slot, H, h, row, live, RP: tl.constexpr, SHARED: tl.constexpr,
              WM: tl.constexpr):  # fmt: skip
    """x M + b, without b where not with_bias; x itself where not live. (m, b): fetch_map of the same slot."""
    y = ()
    for j in tl.static_range(RP):
        y = y + (tl.where(with_bias, b[j], 0.0),)
    for c in tl.static_range(RP):
        if RP > 8:
            line = load_columns(maps, map_offset(slot, H, h, row, RP, SHARED) + c * RP, live, 0, RP, RP, WM)
        else:
            line = m[c * RP : c * RP + RP]
        y = axpby(1.0, y, x[c], line)
    return where_columns(live, y, x)


@triton.jit
def _unit(c, RP: tl.constexpr):
    """Unit vector c; 0 for c = RP. c: a scalar or one per lane."""
    x = ()
    for j in tl.static_range(RP):
        x = x + ((c == j).to(tl.float32),)
    return x


@triton.jit
def _fetch(x, given, k, beta, lam, token_mask, batch, token, h, row, inside, biased, R: tl.constexpr, RP: tl.constexpr,
           SHARED: tl.constexpr, LAM_SHARED: tl.constexpr, REVERSE: tl.constexpr,
           WX: tl.constexpr, WK: tl.constexpr):  # fmt: skip
    """What a token puts into a map, as loaded; x and given only where the vector b is among the lane's."""
    live = is_live(token_mask, batch, token, inside)
    held = live & (row < R)
    kx = load_vector(k, batch, token, h, 0, live, R, RP, WK)
    qx = kx
    if REVERSE:
        qx = load_vector(x, batch, token, h, 0, live & biased, R, RP, WX)
    if given is None:
        value = (row * 0).to(tl.float32)
    else:
        value = load_value(given, batch, token, h, row, held & biased)
    b, l = load_gates(beta, lam, batch, token, h, row, held, SHARED, LAM_SHARED)
    return qx, kx, value, b, l, live


@triton.jit
def _blank(x, given, k, beta, lam, row, RP: tl.constexpr, REVERSE: tl.constexpr):
    """What _fetch returns, of no token."""
    kx = blank_columns(k, row, RP)
    qx = blank_columns(x, row, RP) if REVERSE else kx
    value = (row * 0).to(tl.float32) if given is None else blank(given, row)
    return qx, kx, value, blank(beta, row), blank(beta if lam is None else lam, row), row < 0


@triton.jit(do_not_specialize=["T", "N", "L", "blocks"])
def segment_maps_kernel(
    x, given, k, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, maps, biases, T, N, H, L, blocks,
    R: tl.constexpr, RP: tl.constexpr, VECTORS: tl.constexpr, MAP_SHARED: tl.constexpr, SHARED: tl.constexpr,
    LAM_SHARED: tl.constexpr, RULE: tl.constexpr, COUPLED: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, LANES: tl.constexpr, U: tl.constexpr, WX: tl.constexpr, WK: tl.constexpr, WM: tl.constexpr,
):  # fmt: skip
    """M and b of every segment. given: mem_v; reverse: dreads, and x is mem_q. Program: LANES rows of segments and
    VECTORS of the RP + 1 vectors of each. U tokens are in flight while U are in work; the first turn works on
    none."""
    PACKED: tl.constexpr = cu_seqlens is not None
    pid = tl.program_id(0)
    slot, h, row, _ = lane_of(pid % blocks, H, RP, 1, LANES)
    n, s, begin, length = segment_of(slot, cu_seqlens, T, N, L)
    batch = n * (1 - PACKED)
    count = tl.minimum(length - s * L, L)  # <= 0: no tokens
    base = begin + s * L
    steps = tl.max(count, 0)

    first = (pid // blocks) * VECTORS
    biased = first + VECTORS > RP
    vectors = ()
    if MAP_SHARED:
        biased = True
        vectors = (_unit(row, RP), zero_columns(row, RP))
    else:
        for i in tl.static_range(VECTORS):
            vectors = vectors + (_unit(row * 0 + first + i, RP),)
    b_bias = load_bias(beta_bias, h, row, (length > 0) & (row < R), SHARED)
    l_bias = load_bias(lam_bias, h, row, (length > 0) & (row < R), LAM_SHARED)

    ahead = ()
    for _ in tl.static_range(U):
        ahead = ahead + (_blank(x, given, k, beta, lam, row, RP, REVERSE),)
    t = -U
    while t < steps:
        taken = ahead
        ahead = ()
        for u in tl.static_range(U):
            step = t + U + u
            token = base + (count - 1 - step if REVERSE else step)
            ahead = ahead + (_fetch(x, given, k, beta, lam, token_mask, batch, token, h, row, step < count, biased,
                                    R, RP, SHARED, LAM_SHARED, REVERSE, WX, WK),)  # fmt: skip
        for u in tl.static_range(U):
            qx, kx, value, b, l, live = taken[u]
            kv = widen(kx)
            b, l = open_gates(b, l, b_bias, l_bias, COUPLED, GATE)
            keep, erase, write = terms(b, l, live, RULE)
            value = value.to(tl.float32)
            if not REVERSE:
                value = write * value
            after = ()
            for i in tl.static_range(VECTORS):
                is_bias = (i == 1) if MAP_SHARED else (first + i == RP)
                put = tl.where(is_bias, value, 0.0)
                taken_away = erase * dot(vectors[i], kv, 1)
                if REVERSE:
                    y = axpby(keep, vectors[i], -taken_away, kv)
                    after = after + (axpby(1.0, y, put, widen(qx)),)
                else:
                    after = after + (axpby(keep, vectors[i], put - taken_away, kv),)
            vectors = after
        t += U

    for i in tl.static_range(VECTORS):
        c = row if MAP_SHARED else first + i
        is_map = (i == 0) if MAP_SHARED else (first + i < RP)
        is_bias = (i == 1) if MAP_SHARED else (first + i == RP)
        held = count > 0
        store_columns(maps, map_offset(slot, H, h, row, RP, MAP_SHARED) + c * RP, held & is_map, 0, vectors[i], RP, WM)
        store_columns(biases, bias_offset(slot, H, h, row, RP), held & is_bias, 0, vectors[i], RP, WM)


@triton.jit(do_not_specialize=["T", "N", "L", "source", "target", "blocks"])
def compose_maps_kernel(
    cu_seqlens, maps, biases, T, N, H, L, source, target, blocks,
    RP: tl.constexpr, G: tl.constexpr, MAP_SHARED: tl.constexpr, REVERSE: tl.constexpr, LANES: tl.constexpr,
    WM: tl.constexpr,
):  # fmt: skip
    """Maps of groups of G from those of their members, which hold L tokens each. source, target: the slots where
    each level begins. Program: LANES rows of groups and one of the RP + 1 vectors (both, if shared)."""
    PACKED: tl.constexpr = cu_seqlens is not None
    pid = tl.program_id(0)
    slot, h, row, _ = lane_of(pid % blocks, H, RP, 1, LANES)
    n, g, begin, length = segment_of(slot, cu_seqlens, T, N, L * G)
    members = tl.minimum((length + L - 1) // L - g * G, G)  # <= 0: no group
    low = source + first_slot(n, begin, T, L, PACKED) + g * G
    column = pid // blocks  # unused if shared
    is_bias = column == RP

    start = low + (tl.maximum(members, 1) - 1 if REVERSE else 0)
    held = members > 0
    vectors = ()
    b_offset = bias_offset(start, H, h, row, RP)
    m_offset = map_offset(start, H, h, row, RP, MAP_SHARED)
    if MAP_SHARED:
        vectors = (
            load_columns(maps, m_offset + row * RP, held, 0, RP, RP, WM),
            load_columns(biases, b_offset, held, 0, RP, RP, WM),
        )
    else:
        x = load_columns(maps, m_offset + tl.minimum(column, RP - 1) * RP, held, 0, RP, RP, WM)
        y = load_columns(biases, b_offset, held, 0, RP, RP, WM)
        vectors = (where_columns(is_bias, y, x),)

    steps = tl.max(members, 0)
    member, m, b = start, zero_map(row, RP), zero_columns(row, RP)
    i = 0
    while i < steps:  # i = 0 only fetches
        taken, taken_b, taken_member = m, b, member
        live = (i > 0) & (i < members)
        i += 1
        member = low + (members - 1 - i if REVERSE else i)
        m, b = fetch_map(maps, biases, member, H, h, row, i < members, RP, MAP_SHARED, WM)
        after = ()
        for v in tl.static_range(len(vectors)):
            with_bias = (v == 1) if MAP_SHARED else is_bias
            after = after + (apply_map(vectors[v], taken, taken_b, with_bias, maps, taken_member, H, h, row,
                                       live, RP, MAP_SHARED, WM),)  # fmt: skip
        vectors = after

    slot += target
    m_offset = map_offset(slot, H, h, row, RP, MAP_SHARED)
    b_offset = bias_offset(slot, H, h, row, RP)
    if MAP_SHARED:
        store_columns(maps, m_offset + row * RP, held, 0, vectors[0], RP, WM)
        store_columns(biases, b_offset, held, 0, vectors[1], RP, WM)
    else:
        store_columns(maps, m_offset + column * RP, held & (column < RP), 0, vectors[0], RP, WM)
        store_columns(biases, b_offset, held & is_bias, 0, vectors[0], RP, WM)


@triton.jit
def _nth_before(i, slot, n, s, begin, length, T, L, second, third, REVERSE: tl.constexpr, PACKED: tl.constexpr,
                LEVELS: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr):  # fmt: skip
    """Slot of the i-th map between a sequence's start and its segment s (reverse: its end), and their number."""
    count = (length + L - 1) // L
    from_first = slot - s  # of the sequence's segments
    group, groups = s * 0, s * 0 + 1
    end = count
    from_second = from_first
    span, spans = s * 0, s * 0 + 1
    from_third = from_first
    if LEVELS > 1:
        group, groups = s // G1, (count + G1 - 1) // G1
        end = tl.minimum((group + 1) * G1, count)
        from_second = second + first_slot(n, begin, T, L * G1, PACKED)
    group_end = groups
    if LEVELS > 2:
        span, spans = group // G2, (groups + G2 - 1) // G2
        group_end = tl.minimum((span + 1) * G2, groups)
        from_third = third + first_slot(n, begin, T, L * (G1 * G2), PACKED)
    if REVERSE:
        n3, n2, n1 = spans - 1 - span, group_end - 1 - group, end - 1 - s
        third_slot, second_slot = from_third + spans - 1 - i, from_second + group_end - 1 - (i - n3)
        own = from_first + end - 1 - (i - n3 - n2)
    else:
        n3, n2, n1 = span, group - span * G2, s - group * G1
        third_slot, second_slot = from_third + i, from_second + span * G2 + (i - n3)
        own = from_first + group * G1 + (i - n3 - n2)
    found = tl.where(i < n3 + n2, second_slot, own)
    return tl.where(i < n3, third_slot, found), n3 + n2 + n1


@triton.jit
def carry_state(x, maps, biases, slot, n, s, begin, length, T, L, H, h, row, second, third,
                RP: tl.constexpr, MAP_SHARED: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
                LEVELS: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, WM: tl.constexpr):  # fmt: skip
    """x, a row of the state at its sequence's start (reverse: end), carried to segment s. The next map is in
    flight while one is applied. second, third: the slots where the groups' levels begin."""
    where, total = _nth_before(0, slot, n, s, begin, length, T, L, second, third, REVERSE, PACKED, LEVELS, G1, G2)
    total = tl.where(length > 0, total, 0)
    steps = tl.max(total, 0)
    m, b = zero_map(row, RP), zero_columns(row, RP)
    i = -1
    while i < steps:  # i = -1 only fetches
        taken, taken_b, taken_slot = m, b, where
        live = (i >= 0) & (i < total)
        i += 1
        where, _ = _nth_before(i, slot, n, s, begin, length, T, L, second, third, REVERSE, PACKED, LEVELS, G1, G2)
        m, b = fetch_map(maps, biases, where, H, h, row, i < total, RP, MAP_SHARED, WM)
        x = apply_map(x, taken, taken_b, True, maps, taken_slot, H, h, row, live, RP, MAP_SHARED, WM)
    return x
