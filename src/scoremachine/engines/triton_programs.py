"""The GPU kernel of `engines.triton`, imported only if Triton is available."""

from __future__ import annotations

import triton
import triton.language as tl

from scoremachine.engines import whole

NOTHING = tl.constexpr(whole.NOTHING)


@triton.jit
def fold_rows(
    digits,  # int8 (3, R, K): the queries
    scales,  # float64 (R, 2): factors of products and squares
    blocks,  # int32 (blocks, 3): kind, first row, rows
    classes,  # int32 (kinds, 5), see `engines.triton.Plan`
    offsets,  # int32 (kinds, K)
    images,  # int8 (N, C, H, W)
    ids,  # int64 (n): the positions of the source's images
    sums,  # float64 (parts, C + 3, R): m, Z, Z2 and S of each row
    best,  # float64 (parts, R, KEPT): the largest logits
    places,  # int64 (parts, R, KEPT): their sources
    R,
    K,
    n,
    width,
    pixels,
    C: tl.constexpr,
    LEADERS: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    SOURCES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    block, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kind = tl.load(blocks + 3 * block)
    first = tl.load(blocks + 3 * block + 1)
    rows = tl.load(blocks + 3 * block + 2)
    numbers = tl.load(classes + 5 * kind)
    across = tl.load(classes + 5 * kind + 2)
    each = tl.load(classes + 5 * kind + 1) * across  # patches in an image
    begins = tl.load(classes + 5 * kind + 3)
    pixel = tl.load(classes + 5 * kind + 4)

    here = tl.arange(0, ROWS)
    row = (first + here).to(tl.int64)
    real = here < rows
    product = tl.load(scales + 2 * row, mask=real, other=0.0)
    square = tl.load(scales + 2 * row + 1, mask=real, other=0.0)
    depth = tl.arange(0, DEPTH)
    channel = tl.arange(0, 4)

    # of the patches of all images, in order, this program has [begin, begin + stop)
    total = tl.cast(n, tl.int64) * each
    begin = total * part // parts
    stop = (total * (part + 1) // parts - begin).to(tl.int32)
    start = tl.minimum(begin // each, tl.cast(n, tl.int64) - 1)
    skipped = (begin - start * each).to(tl.int32)
    line = tl.cast(R, tl.int64)
    m = tl.zeros([ROWS], tl.float64)
    Z = tl.zeros([ROWS], tl.float64)
    Z2 = tl.zeros([ROWS], tl.float64)
    S = tl.zeros([ROWS, 4], tl.float64)
    kept = tl.arange(0, KEPT)
    # slots after the last leader are never the smallest
    logits = tl.zeros([ROWS, KEPT], tl.float64) + tl.where(kept < LEADERS, NOTHING, -NOTHING)[None]
    origin = tl.zeros([ROWS, KEPT], tl.int64) - 1
    # step -1 only finds a first m, from the same sources as step 0
    for step in range(-1, (stop + SOURCES - 1) // SOURCES):
        s = tl.maximum(step, 0) * SOURCES + tl.arange(0, SOURCES)
        is_source = s < stop
        s = tl.where(is_source, skipped + s, 0)
        member = s // each
        at = s - member * each
        down = at // across
        place = begins + down * width + at - down * across
        image = tl.load(ids + start + member)
        base = image * (C * pixels) + place
        dot_0 = tl.zeros([ROWS, SOURCES], tl.int32)
        dot_1 = tl.zeros([ROWS, SOURCES], tl.int32)
        dot_2 = tl.zeros([ROWS, SOURCES], tl.int32)
        norm = tl.zeros([SOURCES], tl.int32)
        for k in range(0, numbers, DEPTH):
            d = k + depth
            offset = tl.load(offsets + kind * K + d)
            x = tl.load(images + base[:, None] + offset[None], mask=(d < numbers)[None], other=0)
            q = digits + row[:, None] * K + d[None]
            q_0 = tl.load(q, mask=real[:, None], other=0)
            q_1 = tl.load(q + line * K, mask=real[:, None], other=0)
            q_2 = tl.load(q + 2 * line * K, mask=real[:, None], other=0)
            wide = x.to(tl.int32)
            norm += tl.sum(wide * wide, 1)
            xt = tl.trans(x)
            dot_0 = tl.dot(q_0, xt, dot_0, out_dtype=tl.int32)
            dot_1 = tl.dot(q_1, xt, dot_1, out_dtype=tl.int32)
            dot_2 = tl.dot(q_2, xt, dot_2, out_dtype=tl.int32)
        exact = (dot_2.to(tl.float64) * 256 + dot_1.to(tl.float64)) * 256 + dot_0.to(tl.float64)
        l = exact * product[:, None] - norm.to(tl.float64)[None] * square[:, None]
        above = tl.where(is_source[None], (l - m[:, None]).to(tl.float32), float("-inf"))
        top = tl.max(above, 1)
        counts = step >= 0
        rise = tl.where(counts, tl.maximum(top, 0.0), top)
        m += rise.to(tl.float64)
        # from l again: after a rise of a million nats float32 has no fractional digits
        w = tl.where(is_source[None] & counts, tl.exp((l - m[:, None]).to(tl.float32)), 0.0)
        # where m falls, the sums are still zero
        less = tl.exp(-tl.maximum(rise, 0.0)).to(tl.float64)
        # summed in float64, so that the error of a mean is at most proportional to the
        # differences between its patches
        exactly = w.to(tl.float64)
        Z = Z * less + tl.sum(exactly, 1)
        Z2 = Z2 * less * less + tl.sum(exactly * exactly, 1)
        S *= less[:, None]
        for c in tl.static_range(C):
            v = tl.load(images + base + pixel + c * pixels).to(tl.float64)
            S += tl.where(channel[None] == c, tl.sum(exactly * v[None], 1)[:, None], 0.0)
        if LEADERS > 0:
            l = tl.where(is_source[None] & counts, l, NOTHING)
            smallest = tl.min(logits, 1)
            largest = tl.max(l, 1)
            while tl.max((largest > smallest).to(tl.int32), 0) > 0:
                better = largest > smallest
                # the first of the largest replaces the first of the smallest
                order = tl.arange(0, SOURCES)[None]
                which = tl.min(tl.where(l == largest[:, None], order, SOURCES), 1)
                slot = tl.min(tl.where(logits == smallest[:, None], kept[None], KEPT), 1)
                found = order == which[:, None]
                new = tl.sum(tl.where(found, (image * pixels + place + pixel)[None], 0), 1)
                into = (kept[None] == slot[:, None]) & better[:, None]
                logits = tl.where(into, largest[:, None], logits)
                origin = tl.where(into, new[:, None], origin)
                l = tl.where(found, NOTHING, l)
                smallest = tl.min(logits, 1)
                largest = tl.max(l, 1)

    to = part * (C + 3) * line + row
    tl.store(sums + to, m, mask=real)
    tl.store(sums + to + line, Z, mask=real)
    tl.store(sums + to + 2 * line, Z2, mask=real)
    for c in tl.static_range(C):
        value = tl.sum(tl.where(channel[None] == c, S, 0.0), 1)
        tl.store(sums + to + (3 + c) * line, value, mask=real)
    if LEADERS > 0:
        to = (part * line + row)[:, None] * KEPT + kept[None]
        tl.store(best + to, logits, mask=real[:, None])
        tl.store(places + to, origin, mask=real[:, None])
