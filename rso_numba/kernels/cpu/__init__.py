"""The `cpu` backend: every kernel compiled by Numba, several threads, vector instructions.

Each function of `plain.py` has a twin of the same name and arguments here, most files have one in `../cuda/`.
Read `plain.py` to see what is computed, and the files here to see how it is made fast:

    layout.py        images in, images out: the drawing below
    chain.py         a pass through a chain of layers
    activations.py, convolution.py, dense.py, norms.py, pools.py, softmax.py
                     the layers, each forward beside its backward, with their kernels
    fusion.py        what stands between two layers, computed while the second one reads
    winograd.py      the convolution with fewer multiplications
    delta.py, last_layer.py
                     delta evaluation: what one weight changes
    tiles.py, lanes.py, memory.py
                     what the kernels are made of

Layout. Images are packed into blocks of LANES = 16, the index of the image innermost:

    images (N, C, H, W)                          x (n_blocks, C, H, W, LANES)

    image 0   a0 a1 a2 ...                                 lane 0  1  2      15
    image 1   b0 b1 b2 ...        pack         pixel 0  | a0 b0 c0 ... p0 |
    image 2   c0 c1 c2 ...       ------>       pixel 1  | a1 b1 c1 ... p1 |   block 0 = images 0 to 15
      ...                                      pixel 2  | a2 b2 c2 ... p2 |
    image 15  p0 p1 p2 ...                       ...
    image 16  q0 q1 q2 ...                     pixel 0  | q0 r0 s0 ...    |   block 1 = images 16 to 31

The same pixel of 16 images lies side by side and fills one vector register, so each inner loop runs over
images: it is as fast for a 7x7 map as for a 28x28 map, and it has no borders. Threads share the blocks.
The last block is filled up with zeros; what later layers make of those lanes is never read.

No result depends on the number of threads: a sum over images is made block by block, and the sums of the
blocks are added in their order.
"""

from .activations import add, relu_backward, relu_forward, scale_shift
from .chain import backpropagate, propagate
from .convolution import conv2d_backward, conv2d_forward
from .dense import dense_backward, dense_forward
from .layout import flatten_backward, flatten_forward, pack, unpack
from .norms import batchnorm_backward, batchnorm_statistics
from .pools import (
    avgpool_backward,
    avgpool_forward,
    globalmax_backward,
    globalmax_forward,
    globalmean_backward,
    globalmean_forward,
    maxpool_backward,
    maxpool_forward,
)
from .softmax import cross_entropy, cross_entropy_backward, mean_loss

__all__ = [  # in the order of `plain.py`
    "pack", "unpack", "propagate", "backpropagate", "add", "scale_shift", "conv2d_forward", "conv2d_backward",
    "dense_forward", "dense_backward",
    "batchnorm_statistics", "batchnorm_backward", "relu_forward", "relu_backward", "maxpool_forward",
    "maxpool_backward", "avgpool_forward", "avgpool_backward", "globalmax_forward", "globalmax_backward",
    "globalmean_forward", "globalmean_backward", "flatten_forward", "flatten_backward", "cross_entropy",
    "mean_loss", "cross_entropy_backward",
]
