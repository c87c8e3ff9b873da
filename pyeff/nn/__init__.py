"""The modules: parameters and their layout around the operations of :mod:`pyeff.ops`."""

from pyeff.nn.read import ReadAdapter, ReadStream
from pyeff.nn.ticket import TicketLinear

__all__ = ["ReadAdapter", "ReadStream", "TicketLinear"]
