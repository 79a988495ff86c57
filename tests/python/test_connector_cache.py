"""Layouts of paged caches, and writing into them: every shape that vLLM has had, on CPU tensors."""

import numpy as np
import pytest
import torch
from vsprefill.connector.cache_writer import CpuPackedWriter, StridedWriter
from vsprefill.connector.layouts import LayoutError, PagedLayout, probe
from vsprefill.connector.paged import PagedDestination, require_finite
from vsprefill.errors import DataLossError
from vsprefill.kv_cache import KvLayout

BLOCKS, BLOCK, HEADS, DIM = 7, 16, 3, 8
LAYERS = 2
SIZES = {"blocks": BLOCKS, "block_size": BLOCK, "heads": HEADS, "dim": DIM}

SHAPES = {
    "kv_blocks": (2, BLOCKS, BLOCK, HEADS, DIM),
    "blocks_kv": (BLOCKS, 2, BLOCK, HEADS, DIM),
    "packed": (BLOCKS, HEADS, BLOCK, 2 * DIM),
    "kv_blocks_heads": (2, BLOCKS, HEADS, BLOCK, DIM),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_probe_knows_every_shape(kind):
    assert probe(SHAPES[kind], **SIZES) == PagedLayout(kind, BLOCKS, BLOCK)
    assert probe(SHAPES[kind], **SIZES, named=kind).kind == kind


@pytest.mark.parametrize("shape", [
    (BLOCKS, BLOCK, 2 * DIM), (BLOCKS, HEADS, BLOCK, DIM), (BLOCKS + 1, HEADS, BLOCK, 2 * DIM),
    (BLOCKS, HEADS + 1, BLOCK, 2 * DIM), (3, BLOCKS, BLOCK, HEADS, DIM), (BLOCKS, HEADS, BLOCK, 2 * DIM, 1),
    (BLOCKS // 7, HEADS, BLOCK * 7, 2 * DIM), (2, BLOCKS, 0, HEADS, DIM),
])
def test_probe_refuses_others_and_names_the_shape(shape):
    with pytest.raises(LayoutError) as caught:
        probe(shape, **SIZES)
    assert str(shape) in str(caught.value)


def test_probe_of_smaller_blocks():
    assert probe((BLOCKS * 4, HEADS, BLOCK // 4, 2 * DIM), **SIZES) == PagedLayout("packed", BLOCKS * 4, BLOCK // 4)
    with pytest.raises(LayoutError):  # 6 does not divide 16: a block would straddle
        probe((BLOCKS * 16 // 8, HEADS, 8, 2 * DIM), blocks=BLOCKS * 16 // 12, block_size=12, heads=HEADS, dim=DIM)


@pytest.mark.parametrize("shape,sizes,kinds", [
    ((2, 2, BLOCK, HEADS, DIM), {**SIZES, "blocks": 2}, ("kv_blocks", "blocks_kv")),
    ((2, BLOCKS, HEADS, HEADS, DIM), {**SIZES, "block_size": HEADS}, ("kv_blocks", "kv_blocks_heads")),
])
def test_a_shape_that_fits_several_wants_a_name(shape, sizes, kinds):
    with pytest.raises(LayoutError, match=" or ".join(kinds)):
        probe(shape, **sizes)
    for kind in kinds:
        assert probe(shape, **sizes, named=kind).kind == kind
    with pytest.raises(LayoutError, match="'nope' is not one of"):
        probe(shape, **sizes, named="nope")
    with pytest.raises(LayoutError, match="not \\(blocks, heads"):
        probe(shape, **sizes, named="packed")


def strided(kind, dtype, order):
    """A cache of a kind whose strides are those of another order of dimensions, every value NaN."""
    shape = SHAPES[kind]
    if order == "plain":
        return torch.full(shape, float("nan"), dtype=dtype)
    if order == "gaps":  # the layers of a block side by side: stride(0) exceeds a block
        axis = 1 if kind == "kv_blocks" else 0
        wide = list(shape)
        wide[axis] *= 2
        return torch.full(wide, float("nan"), dtype=dtype)[(slice(None),) * axis + (slice(None, None, 2),)]
    permutation = list(range(len(shape)))
    permutation[-3], permutation[-2] = permutation[-2], permutation[-3]
    inner = torch.full([shape[i] for i in permutation], float("nan"), dtype=dtype)
    return inner.permute(permutation)


def read(cache, kind, slot, head):
    """(K, V) of one token, by the definition of the layout."""
    b, o = divmod(slot, BLOCK)
    if kind == "kv_blocks":
        return cache[0, b, o, head], cache[1, b, o, head]
    if kind == "blocks_kv":
        return cache[b, 0, o, head], cache[b, 1, o, head]
    return cache[b, head, o, :DIM], cache[b, head, o, DIM:]


@pytest.mark.parametrize("order", ["plain", "gaps", "swapped"])
@pytest.mark.parametrize("kind", ["kv_blocks", "blocks_kv", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_writer_puts_each_token_in_its_place(kind, dtype, order):
    cache = strided(kind, dtype, order)
    assert cache.shape == SHAPES[kind]
    writer = StridedWriter(cache, probe(tuple(cache.shape), **SIZES))
    slots = torch.tensor([5 * BLOCK + 3, 5 * BLOCK + 4, 0, 6 * BLOCK + 15])
    keys, values = torch.randn(2, HEADS, len(slots), DIM).to(dtype)
    writer.write(keys, values, slots)
    writer.synchronize()
    for i, slot in enumerate(slots.tolist()):
        for head in range(HEADS):
            k, v = read(cache, kind, slot, head)
            assert torch.equal(k, keys[head, i]) and torch.equal(v, values[head, i])
    assert int((~cache.isnan()).sum()) == 2 * HEADS * DIM * len(slots)  # and nothing else was touched


def test_strided_writer_of_smaller_blocks():
    cache = torch.zeros(BLOCKS * 4, HEADS, BLOCK // 4, 2 * DIM)
    writer = StridedWriter(cache, probe(tuple(cache.shape), **SIZES))
    keys, values = torch.randn(2, HEADS, 1, DIM)
    writer.write(keys, values, torch.tensor([3 * BLOCK + 6]))  # block 3, offset 6: part 1 of it, offset 2
    assert torch.equal(cache[3 * 4 + 1, :, 2, :DIM], keys[:, 0])
    assert torch.equal(cache[3 * 4 + 1, :, 2, DIM:], values[:, 0])


def fake_op(key, value, key_cache, value_cache, slot_mapping, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"):
    """The bytes of vLLM's op for isa "vec": K of a block column-major, V row-major."""
    assert isa == "vec" and slot_mapping.dtype == torch.int64
    for i, slot in enumerate(slot_mapping.tolist()):
        b, o = divmod(slot, BLOCK)
        key_cache[b].flatten(1).unflatten(1, (DIM, BLOCK))[:, :, o] = key[i]
        value_cache[b, :, o] = value[i]


@pytest.mark.parametrize("kind", ["packed", "kv_blocks_heads"])
def test_cpu_writer_hands_vllms_op_its_views(kind):
    cache = torch.zeros(SHAPES[kind])
    writer = CpuPackedWriter(cache, probe(tuple(cache.shape), **SIZES), fake_op, "vec")
    slots = torch.tensor([BLOCK, BLOCK + 1, 4 * BLOCK + 15])
    keys, values = torch.randn(2, HEADS, len(slots), DIM)
    writer.write(keys, values, slots)
    for i, slot in enumerate(slots.tolist()):
        b, o = divmod(slot, BLOCK)
        for head in range(HEADS):
            block = cache[b, head].flatten() if kind == "packed" else torch.cat([cache[0, b, head].flatten(),
                                                                                cache[1, b, head].flatten()])
            k, v = block.chunk(2)
            assert torch.equal(k.view(DIM, BLOCK)[:, o], keys[head, i])
            assert torch.equal(v.view(BLOCK, DIM)[o], values[head, i])


def test_cpu_writer_refuses_what_the_op_would_turn_into_garbage():
    cache = torch.zeros(SHAPES["packed"], dtype=torch.bfloat16)
    layout = probe(tuple(cache.shape), **SIZES)
    keys = torch.zeros(HEADS, 1, DIM)
    with pytest.raises(LayoutError, match="float32 into a cache of torch.bfloat16"):
        CpuPackedWriter(cache, layout, fake_op, "vec").write(keys, keys, torch.tensor([0]))
    with pytest.raises(LayoutError, match="expected it to begin with"):
        CpuPackedWriter(cache, layout, lambda key, isa: None, "vec")
    for kind in ("kv_blocks", "blocks_kv"):
        with pytest.raises(LayoutError, match=kind):
            CpuPackedWriter(torch.zeros(SHAPES[kind]), probe(SHAPES[kind], **SIZES), fake_op, "vec")
    with pytest.raises(LayoutError, match="kv_blocks_heads"):
        StridedWriter(torch.zeros(SHAPES["kv_blocks_heads"]), probe(SHAPES["kv_blocks_heads"], **SIZES))


def kv_layout(prompt, start=0, dtype="float32", layers=LAYERS):
    return KvLayout(layers, HEADS, DIM, dtype, "id", prompt, start)


def make_paged(prompt, start=0, block_ids=(6, 2, 4), layers=LAYERS):
    caches = [torch.full(SHAPES["packed"], float("nan")) for _ in range(LAYERS)]
    writers = [StridedWriter(cache, probe(tuple(cache.shape), **SIZES)) for cache in caches]
    return caches, PagedDestination(kv_layout(prompt, start, layers=layers), writers, block_ids, BLOCK)


@pytest.mark.parametrize("prompt,start", [(40, 0), (48, 16), (33, 32), (17, 5)])
def test_paged_destination_fills_the_blocks_and_zeroes_the_rest(prompt, start):
    caches, destination = make_paged(prompt, start)
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((LAYERS, 2, HEADS, prompt, DIM)).astype(np.float32)
    for layer in range(LAYERS):
        for begin in range(start, prompt, 7):
            end = min(begin + 7, prompt)
            destination.write(layer, begin, kv[layer, 0, :, begin:end], kv[layer, 1, :, begin:end])
    destination.synchronize()
    blocks = (6, 2, 4)
    last = -(-prompt // BLOCK) * BLOCK
    for layer, cache in enumerate(caches):
        written = torch.zeros(BLOCKS * BLOCK, dtype=torch.bool)
        for t in range(start, last):
            slot = blocks[t // BLOCK] * BLOCK + t % BLOCK
            written[slot] = True
            for head in range(HEADS):
                expected = kv[layer, :, head, t] if t < prompt else np.zeros((2, DIM), np.float32)
                got = np.stack([half.numpy() for half in read(cache, "packed", slot, head)])
                np.testing.assert_array_equal(got, expected)
        rest = ~written.view(BLOCKS, 1, BLOCK, 1).expand(cache.shape)
        assert cache[rest].isnan().all()  # blocks of others, and a local hit's tokens, are untouched


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(dtype, bad):
    values = np.full((HEADS, 5, DIM), 1e38, np.float32)
    values[1, 2, 3] = -3.3e38
    clean = values if dtype == np.float32 else (values.view(np.uint32) >> 16).astype(np.uint16)
    require_finite(clean, "x")
    values[2, 4, 7] = bad
    torn = values if dtype == np.float32 else (values.view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(DataLossError, match="keys: NaN or infinity"):
        require_finite(torn, "keys")


def test_nan_never_reaches_a_block():
    caches, destination = make_paged(40)
    keys = np.zeros((HEADS, 4, DIM), np.float32)
    values = keys.copy()
    values[0, 0, 0] = np.nan
    before = [cache.clone() for cache in caches]
    with pytest.raises(DataLossError, match="values of layer 1, tokens from 8"):
        destination.write(1, 8, keys, values)
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache.isnan(), old.isnan())


def test_paged_destination_checks_its_room():
    with pytest.raises(ValueError, match="3 blocks of 16 tokens for 49 tokens"):
        make_paged(49)
    with pytest.raises(DataLossError, match="3 layers for a cache of 2"):
        make_paged(40, layers=3)


def test_bfloat16_bits_arrive_unchanged():
    cache = torch.zeros(SHAPES["packed"], dtype=torch.bfloat16)
    writer = StridedWriter(cache, probe(tuple(cache.shape), **SIZES))
    destination = PagedDestination(kv_layout(3, dtype="bfloat16", layers=1), [writer], [1], BLOCK)
    bits = np.arange(HEADS * 3 * DIM, dtype=np.uint16).reshape(HEADS, 3, DIM)
    bits.setflags(write=False)  # as a received message is
    destination.write(0, 0, bits, bits)
    got = cache[1, :, :3, :DIM].contiguous().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got, bits)
