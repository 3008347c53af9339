"""The yardstick by itself: copies of the sizes of the other suites."""
import math

import bench_inference
import bench_training
from side_by_side import measure_copy


def counts():
    """Elements: so many are read, and as many written."""
    found = {math.prod(shape) for shape in bench_inference.SHAPES}
    for shape in bench_training.SHAPES:
        # X, Y; X, dY, dX; all five: half of them is read, half is written
        found |= {math.prod(shape) * arrays // 2 for arrays in (2, 3, 5)}
    return sorted(found)


def run():
    return measure_copy('copy, five fresh processes', counts())
