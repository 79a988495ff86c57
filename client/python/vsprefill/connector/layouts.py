"""Finds out how an engine's paged KV cache lies in memory, from the tensor it registered. No torch needed.

Dimensions: blocks, block_size (tokens per block), heads (KV heads), dim (head dimension). Only shapes are
looked at; strides belong to the tensor, and code that writes must index views and never compute addresses.
"""

from __future__ import annotations

from dataclasses import dataclass


class LayoutError(ValueError):
    """A cache tensor whose layout is unknown or not clear; the message holds its shape."""


@dataclass(frozen=True)
class PagedLayout:
    """kind: a key of KINDS. blocks, block_size: of the tensor, whose blocks may be parts of the engine's."""

    kind: str
    blocks: int
    block_size: int


# Logical shapes: where K and V of block b, token offset o, head h are found.
KINDS = {
    "kv_blocks": "(2, blocks, block_size, heads, dim): K [0, b, o, h], V [1, b, o, h]",
    "blocks_kv": "(blocks, 2, block_size, heads, dim): K [b, 0, o, h], V [b, 1, o, h]",
    "packed": "(blocks, heads, block_size, 2*dim): K [b, h, o, :dim], V [b, h, o, dim:]",
    "kv_blocks_heads": "(2, blocks, heads, block_size, dim): K [0, b, h], V [1, b, h], packed by vLLM's CPU kernels",
}


def probe(shape: tuple[int, ...], *, blocks: int, block_size: int, heads: int, dim: int,
          named: str = "") -> PagedLayout:
    """The layout of a cache tensor of one layer.

    blocks, block_size: the engine's. A tensor may hold each of the engine's blocks as several smaller ones.
    named: the kind that settings name, for shapes that fit several. Raises LayoutError.
    """
    if named and named not in KINDS:
        raise LayoutError(f"layout {named!r} is not one of {', '.join(KINDS)}")
    tokens = blocks * block_size
    found: list[PagedLayout] = []

    def consider(kind: str, nb: int, bs: int, rest: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if rest == expected and nb * bs == tokens and bs > 0 and block_size % bs == 0:
            found.append(PagedLayout(kind, nb, bs))

    if len(shape) == 5:
        a, b, c, d, e = shape
        consider("kv_blocks", b, c, (a, d, e), (2, heads, dim))
        consider("blocks_kv", a, c, (b, d, e), (2, heads, dim))
        consider("kv_blocks_heads", b, d, (a, c, e), (2, heads, dim))
    elif len(shape) == 4:
        a, b, c, d = shape
        consider("packed", a, c, (b, d), (heads, 2 * dim))
    what = f"cache of shape {shape} for {blocks} blocks of {block_size} tokens, {heads} KV heads, head_dim {dim}"
    if named:
        found = [f for f in found if f.kind == named]
    if not found:
        raise LayoutError(f"{what}: " + (f"not {KINDS[named]}" if named else "no known layout; known are " +
                                         "; ".join(KINDS.values())))
    if len(found) > 1:
        raise LayoutError(f"{what}: may be {' or '.join(f.kind for f in found)}; name one with the setting layout")
    return found[0]
