"""The `cuda` backend: every kernel compiled by Numba for an NVIDIA GPU, where a thread is an image.

Each function of `plain.py` has a twin of the same name and arguments here, and each file but `device.py` has
one in `../cpu/`. Read `plain.py` to see what is computed. The formulas are the ones that `../cpu/` compiles
for the CPU.

Layout. As on the CPU, images are packed into blocks with the index of the image innermost, here LANES = 32:

    images (N, C, H, W)                          x (n_blocks, C, H, W, LANES), on the GPU

    image 0   a0 a1 a2 ...                                 lane 0  1  2      31
    image 1   b0 b1 b2 ...        pack         pixel 0  | a0 b0 c0 ... f0 |
      ...                        ------>       pixel 1  | a1 b1 c1 ... f1 |   block 0 = images 0 to 31
    image 31  f0 f1 f2 ...                       ...
    image 32  g0 g1 g2 ...                     pixel 0  | g0 h0 ...       |   block 1 = images 32 to 63

The 32 threads of a warp do the same at the same time, each for its own image: they read 128 bytes side by
side, and none of them waits for another at the border of a map. The last block is filled up with zeros; what
later layers make of those lanes is never read.

Activations stay on the GPU. Weights come as NumPy arrays and are copied there at each call; losses,
statistics and gradients of weights come back as NumPy arrays. Functions named `..._kernel` run on the GPU:
they take arrays that are there, allocate nothing and wait for nothing. No result depends on which thread is
first: a sum over images is made block by block in a fixed order, and the sums of the blocks are added in
float64.
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
