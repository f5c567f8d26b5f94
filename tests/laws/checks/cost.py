"""Law 7: the cost that is announced is the cost that is paid."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..tools import Make, forms, inputs

aten = torch.ops.aten


def sdpa(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """2 per multiply-add, the full query x key rectangle."""
    (batch, heads, queries, width), keys = q, k[2]
    flops: int = 2 * batch * heads * queries * keys * (width + v[-1])
    return flops


def added_product(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    """(..., n, m) x (..., m, p): torch counts these as zero."""
    total: int = 2 * a[-1]
    for size in a[:-1]:
        total *= size
    columns: int = b[-1] if len(b) > 1 else 1
    return total * columns


def product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return added_product(None, a, b)


COUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa,
    aten.baddbmm_: added_product,
    aten.addmm_: added_product,
    aten.addmv: added_product,
    aten.addmv_: added_product,
    aten.mv: product,
    aten.dot: product,
}


def check_flops(make: Make) -> None:
    """flops(length) within 2 % of what the forward does, for several lengths and batches, in every form."""
    for keywords in [{"kv_heads": 4}, *forms(make)]:
        mixer = make(dtype=torch.float32, **keywords)
        plain = "kv_heads" in keywords
        for length, batch in (
            ((1, 3), (63, 1)) if plain else ((1, 1), (1, 3), (2, 1), (7, 3), (63, 1), (200, 3), (257, 1))
        ):
            with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
                mixer(inputs(1, batch, length, dtype=torch.float32))
            counted, announced = counter.get_total_flops(), mixer.flops(length, batch_size=batch)
            what = f"{batch} x {length} tokens, {keywords}: says {announced}, does {counted}"
            assert counted > 0, f"nothing counted: {what}"
            assert abs(announced - counted) <= 0.02 * counted, what
        assert isinstance(announced, int)
        assert mixer.flops(64) == mixer.flops(64, batch_size=1)


def check_pairs(make: Make) -> None:
    """pairs(length) is the number of attended pairs over all heads: the entries of the attention map."""
    for keywords in forms(make):
        mixer = make(**keywords)
        for length in (1, 2, 5, 16, 33):
            announced = mixer.pairs(length)
            assert isinstance(announced, int)
            if not mixer.traits.linear_in_values:
                continue  # there is no map to count
            # Nearly equal scores, so that no weight is zero for another reason than not being attended.
            with torch.no_grad():
                attended = int((mixer.attention_map(inputs(1, 1, length, scale=1e-3)) != 0).sum())
            what = f"{length} tokens, {keywords}: says {announced} pairs, the map has {attended}"
            assert attended <= announced, what
            if not (mixer.traits.selects or mixer.traits.sparse):
                assert attended == announced, what
        assert mixer.pairs(64) >= mixer.pairs(63) >= mixer.pairs(1) >= 1
