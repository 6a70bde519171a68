"""What ranks tell each other: the same value comes out, nothing else goes in, and nothing is unpickled."""

from pathlib import Path

import numpy as np
import pytest
import torch

from atlas.files.jsonl import DataError
from atlas.runtime import distributed
from atlas.runtime.messages import pack, pack_error, unpack, unpack_error
from tests.ranks import run_on_ranks

VALUES = [
    None,
    True,
    -3,
    2**70,
    0.1,
    float("inf"),
    "ü \u2028 \ud800",
    b"\x00\xff",
    Path("a/b"),
    [],
    (),
    {},
    [1, (2.5, None), {"a": [b"x", b"", b"yz"]}],
    {"$tensor": [1], "$dict": {"$tuple": 3}, "$": None},
    {"$tuple": [1]},
    {"only": (1, 2)},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_out_as_it_went_in(value):
    found = unpack(pack(value))
    assert found == value and type(found) is type(value) and repr(found) == repr(value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors(dtype, shape):
    tensor = (torch.arange(6).reshape(2, 3) % 5).to(getattr(torch, dtype))
    tensor = tensor if shape == (2, 3) else tensor.new_ones(shape)
    first, text, second = unpack(pack([tensor.mT if tensor.dim() == 2 else tensor, "between", tensor]))
    assert text == "between" and second.dtype == tensor.dtype and torch.equal(second, tensor)
    assert torch.equal(first, tensor.mT if tensor.dim() == 2 else tensor)
    second.fill_(0)


@pytest.mark.parametrize("dtype", ["uint64", "int64", "float32"])
def test_arrays(dtype):
    array = np.array([[1, 2], [3, 4]], dtype)[:, ::-1]
    found = unpack(pack((array,)))[0]
    assert found.dtype == array.dtype and np.array_equal(found, array)
    assert unpack(pack(np.zeros((0, 4), dtype))).shape == (0, 4)


@pytest.mark.parametrize(
    "value", [{1: 2}, {1, 2}, object(), ValueError("x"), np.int64(1), torch.zeros(1, device="meta")]
)
def test_other_things_are_not_sent(value):
    with pytest.raises(TypeError, match="cannot be sent to another rank"):
        pack([value])


class _OwnError(DataError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("a bad line"), ValueError),
        (_OwnError("x.jsonl, line 3"), DataError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), ValueError),
        (FileNotFoundError(2, "No such file", "x"), FileNotFoundError),
        (ZeroDivisionError("a bug"), RuntimeError),
    ],
)
def test_errors_keep_their_kind_and_their_words(error, kind):
    found = unpack_error(unpack(pack(pack_error(error))))
    assert type(found) is kind and str(found) == str(error)
    assert unpack_error(pack_error(None)) is None


def _tell(values):
    me = distributed.rank()
    mine = {"tensor": torch.full((me, 2), float(me)), "value": (me, values[me % len(values)])}
    return [
        distributed.gather_objects(mine),
        distributed.gather_on_main(mine),
        distributed.from_main(mine),
        [distributed.send_to_main(mine, owner) for owner in range(3)],
    ]


@pytest.mark.processes
def test_every_collective_brings_them_unchanged():
    expected = [{"tensor": torch.full((rank, 2), float(rank)), "value": (rank, VALUES[rank])} for rank in range(3)]
    for rank, (all_values, on_main, from_main, sent) in enumerate(run_on_ranks(3, _tell, VALUES)):
        main = rank == 0
        assert repr(all_values) == repr(expected) and repr(from_main) == repr(expected[0])
        assert repr(on_main) == repr(expected if main else [])
        assert repr(sent) == repr(expected if main else [None] * 3)
