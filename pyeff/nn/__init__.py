"""The modules: parameters and their layout around the operations of :mod:`pyeff.ops`."""

from pyeff.nn.multimask import (
    CollapseWatch,
    ConvDecoder1d,
    ConvDecoder2d,
    EMATeacher,
    LayerStack,
    LossParts,
    MultimaskLoss,
    MultimaskStudent,
    MultimaskTargets,
    RelativeBias,
    TargetRecorder,
    key_mask,
    slopes_of,
)
from pyeff.nn.read import ReadAdapter, ReadStream
from pyeff.nn.ticket import TicketLinear

__all__ = [
    "CollapseWatch",
    "ConvDecoder1d",
    "ConvDecoder2d",
    "EMATeacher",
    "LayerStack",
    "LossParts",
    "MultimaskLoss",
    "MultimaskStudent",
    "MultimaskTargets",
    "ReadAdapter",
    "ReadStream",
    "RelativeBias",
    "TargetRecorder",
    "TicketLinear",
    "key_mask",
    "slopes_of",
]
