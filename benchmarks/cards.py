"""What makers state of their GPUs: memory and rates, for the planner's arithmetic."""

from typing import NamedTuple


class Card(NamedTuple):
    """What the maker of a GPU states."""

    gigabytes: float
    half: float  # TFLOP/s of dense 16-bit products, summed in fp32
    full: float  # of fp32
    bandwidth: float  # GB/s
    bf16: bool = True


CARDS = {
    "t4": Card(16, 65, 8.1, 320, bf16=False),
    "v100-32gb": Card(32, 125, 15.7, 900, bf16=False),
    "rtx3060-12gb": Card(12, 25, 12.7, 360),
    "rtx3090": Card(24, 71, 35.6, 936),
    "rtx4080": Card(16, 97, 48.7, 717),
    "rtx4090": Card(24, 165, 82.6, 1008),
    "l4": Card(24, 121, 30.3, 300),
    "a10": Card(24, 125, 31.2, 600),
    "a6000": Card(48, 155, 38.7, 768),
    "l40s": Card(48, 362, 91.6, 864),
    "a100-40gb": Card(40, 312, 19.5, 1555),
    "a100-80gb": Card(80, 312, 19.5, 2039),
    "h100": Card(80, 989, 67, 3350),
    "h200": Card(141, 989, 67, 4800),
    "b200": Card(180, 2250, 75, 8000),
}
