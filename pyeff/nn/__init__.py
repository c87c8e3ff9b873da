"""The modules: parameters and their layout around the operations of :mod:`pyeff.ops`."""

from pyeff.nn.read import ReadAdapter, ReadStream

__all__ = ["ReadAdapter", "ReadStream"]
