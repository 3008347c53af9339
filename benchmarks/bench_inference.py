"""Batch norm with given statistics: one call from Python."""
from side_by_side import measure

SHAPES = [(1, 8, 28, 28), (1, 32, 28, 28), (1, 256, 28, 28), (1, 64, 112, 112),
          (32, 64, 56, 56), (1, 256, 224, 224)]


def run():
    return measure('inference', 'inference, given statistics', SHAPES)
