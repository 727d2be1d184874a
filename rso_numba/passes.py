"""What all layers are told in one pass through the network, and what they leave for each other."""

from dataclasses import dataclass, field


@dataclass
class Pass:
    """What all layers are told in one pass through the network.

    Parameters
    ----------
    kernels : module
        The backend.
    n_images : int
        Number of images; the `cpu` and `cuda` backends pad their last block.
    batch_statistics : bool
        BatchNorm uses the statistics of these images instead of its stored ones.
    fixed : collection of str
        Names of BatchNorms that use their stored statistics all the same.
    momentum : float
        How far BatchNorm moves its stored statistics to those of these images: 0 not at all,
        1 replaces them.
    statistics : dict
        Mean and variance that each BatchNorm used, by layer name, filled by forward.
    saved : dict or None
        Where layers keep what their backward needs; None in passes that have no backward.
    gradients : dict
        Gradient of every parameter, by (layer name, parameter name), filled by backward.
    first : Layer or None
        Where backward ends: the first layer with weights, whose own input needs no gradient.
    """

    kernels: object
    n_images: int
    batch_statistics: bool = False
    fixed: frozenset = frozenset()
    momentum: float = 0.0
    statistics: dict = field(default_factory=dict)
    saved: dict | None = None
    gradients: dict = field(default_factory=dict)
    first: object = None

    def save(self, layer, *arrays):
        """Keep `arrays` for the backward of `layer`, if there will be one."""
        if self.saved is not None:
            self.saved[layer.name] = arrays

    def collect(self, layer, **gradients):
        """Keep the gradients of the parameters that `layer` trains."""
        for parameter in layer.parameter_names:
            self.gradients[layer.name, parameter] = gradients[parameter]
