"""Tiles that read consecutive blocks: the gradients of their keys, and the masks that they share."""

import torch

from longspan.engine.neighbors import MemberMasks, NeighborTiles


def test_one_product_per_block_sums_over_the_tiles_that_read_it() -> None:
    generator = torch.Generator().manual_seed(0)
    neighbors = NeighborTiles(tiles=7, width=3, size=4)
    values = torch.randn(7, 4, 12, generator=generator)
    x = torch.randn(7, 4, 5, generator=generator)
    numbers = neighbors.empty(x)
    numbers.copy_(values)
    expected = torch.zeros(9, 4, 5)
    for tile in range(7):
        for block in range(3):
            expected[tile + block] += values[tile, :, 4 * block : 4 * block + 4].mT @ x[tile]
    torch.testing.assert_close(neighbors.by_block(numbers, x), expected)


def test_few_tiles_are_not_worth_tiles_of_zeros() -> None:
    assert NeighborTiles(tiles=4, width=3, size=4).worthwhile()
    assert not NeighborTiles(tiles=3, width=3, size=4).worthwhile()


def test_masks_show_the_last_members_of_the_group() -> None:
    """A group of 7 members in slots 4 to 10, blocks of 4: the second tile has three of them, and an empty slot."""
    slot, rank = torch.arange(4, 11)[None], torch.arange(7)[None]
    masks = MemberMasks.at_slots(slot, rank, 3, 4, (3, False))
    visible = masks.additive(torch.float32)[masks.number] == 0
    assert visible.shape == (3, 4, 8)  # keys: the block before the tile's own, and its own
    for query in range(7):
        own = int(slot[0, query])
        seen = {int(key) + own // 4 * 4 - 4 for key in visible[own // 4, own % 4].nonzero()}
        assert seen == set(range(max(4, own - 3), own))
