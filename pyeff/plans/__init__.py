"""What is decided about a call before its numbers are there: index structures, built once and used by every layer."""

from pyeff.plans.mask import MaskPlan
from pyeff.plans.ticket import Ticket

__all__ = ["MaskPlan", "Ticket"]
