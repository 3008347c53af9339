"""The whole digit network: from images to logits.

The fair race is that on 26 x 26 pixels. Pooling drops the last rows and
columns of an image of 28 x 28: our program does not compute what is dropped,
and smaller images save everybody the same.
"""
from side_by_side import measure

SHAPES = [(1, 1, 26, 26), (64, 1, 26, 26), (1, 1, 28, 28), (64, 1, 28, 28)]


def run():
    return measure('network', 'digit network', SHAPES)
