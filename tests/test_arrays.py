"""One array on disk: whole blocks from each rank, their checksums, and ranges of rows."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from atlas.index import arrays
from atlas.index.arrays import BYTE, FP16, Layout, as_tensor, check_all, check_header, map_rows, recorded, write_array
from atlas.runtime import distributed
from tests.ranks import run_on_ranks, scratch_directory


def _write(path, rows, bounds, block_bytes, in_parts_of):
    """Write this rank's rows; what was recorded, and the ranges of bytes that went to the file."""
    written, pwrite, before = [], os.pwrite, arrays.BLOCK_BYTES

    def recording(file, content, position):
        some = pwrite(file, content[:5000], position)  # no more at a time, as a full pipe or disk may do
        written.append((position, position + some))
        return some

    os.pwrite, arrays.BLOCK_BYTES = recording, block_bytes
    try:
        mine = rows[bounds[distributed.rank()] : bounds[distributed.rank() + 1]]
        parts = ((mine[i : i + in_parts_of], float(i)) for i in range(0, len(mine), in_parts_of))
        layout = Layout(len(rows), rows.shape[1], BYTE)
        return write_array(path, layout, bounds[distributed.rank()], parts), written
    finally:
        os.pwrite, arrays.BLOCK_BYTES = pwrite, before


def bounds_of(n, world_size, how):
    if how == "even":
        return [distributed.shard_rows(n, rank, world_size).start for rank in range(world_size)] + [n]
    return [0, *[min(3, n)] * (world_size - 1), n]  # one rank has almost nothing, the others nothing or all


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("block_bytes", [4096, 3 * 4096, 2**22])
def test_ranks_write_whole_blocks_and_the_same_file(world_size, block_bytes):
    for number, (n, how) in enumerate([(0, "even"), (1, "even"), (2, "even"), (700, "even"), (700, "uneven")]):
        rows = np.random.default_rng(n).integers(0, 256, (n, 37), np.uint8)  # rows that cross pages
        path = Path(scratch_directory()) / f"codes.{number}.npy"
        arguments = (path, rows, bounds_of(n, world_size, how), block_bytes, 10)
        answers = run_on_ranks(world_size, _write, *arguments)
        content = path.read_bytes()
        assert np.array_equal(np.load(path), rows) and content[4096:] == rows.tobytes()
        blocks = [zlib.crc32(content[i : i + block_bytes]) for i in range(0, len(content), block_bytes)]
        largest = max((len(range(a, b, 10)) - 1) * 10 for a, b in zip(arguments[2], arguments[2][1:], strict=False))
        for array, _ in answers:
            assert array.blocks == "".join(f"{block:08x}" for block in blocks) and array.block_bytes == block_bytes
            assert array.file == path.name and array.largest_norm == max(largest, 0)
        owners = [{start // block_bytes for start, _ in written} for _, written in answers]
        assert sum(map(len, owners)) == len(set().union(*owners))  # no block has two writers
        covered = sorted(part for _, written in answers for part in written)
        assert all(a[1] == b[0] for a, b in zip(covered, covered[1:], strict=False))  # each byte once


def _fail(path, on_rank):
    def parts():
        yield np.zeros((2, 5), np.uint8), 0.0
        if distributed.rank() == on_rank:
            raise ValueError("passage 7 is not finite")

    try:
        write_array(path, Layout(6, 5, BYTE), 2 * distributed.rank(), parts())
    except ValueError as error:
        return str(error)


@pytest.mark.processes
def test_a_mistake_of_one_rank_ends_all():
    for rank in range(3):
        path = Path(scratch_directory()) / "codes.1.npy"
        assert run_on_ranks(3, _fail, path, rank) == ["passage 7 is not finite"] * 3


@pytest.mark.parametrize("header_bytes", [128, 4096])
def test_rows_are_mapped_from_the_middle_of_a_file(tmp_path, header_bytes):
    """Of both versions of the format."""
    rows = np.random.default_rng(0).normal(size=(500, 7)).astype(FP16)
    layout = Layout(500, 7, FP16, header_bytes)
    (tmp_path / "a.npy").write_bytes(layout.header() + rows.tobytes())
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)
    for part in (range(500), range(0), range(123, 124), range(300, 500), range(500, 500)):
        mapped = map_rows(tmp_path / "a.npy", layout, part)
        assert np.array_equal(mapped, rows[part.start : part.stop]) and mapped.shape == (len(part), 7)
        assert not mapped.flags.writeable or not len(part)
        assert np.array_equal(as_tensor(mapped).numpy(), mapped)


def test_damage_is_located(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 4096)
    rows = np.zeros((5000, 4), np.uint8)
    layout, path = Layout(5000, 4, BYTE), tmp_path / "codes.1.npy"
    array = write_array(path, layout, 0, [(rows, 1.0)])
    check_all(recorded(tmp_path, array, layout))
    content = bytearray(path.read_bytes())
    content[2 * 4096] = content[4 * 4096 + 5] = 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"2 of 6 blocks .*\(from 0: 2, 4; all are in rows 1024 to 4096\)"):
        check_all(recorded(tmp_path, array, layout))
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="24095 bytes long, 5000 x 4 bytes take 24096"):
        check_header(path, layout)
