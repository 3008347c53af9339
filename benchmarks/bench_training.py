"""Batch norm with batch statistics: forward, backward, and both."""
from side_by_side import measure

SHAPES = [(64, 50, 8, 8), (64, 20, 26, 26), (128, 16, 32, 32),
          (32, 64, 56, 56), (32, 256, 28, 28)]


def run():
    return measure('training', 'training, batch statistics', SHAPES)
