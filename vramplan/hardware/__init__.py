"""What a machine has, and what may be used of it."""

from vramplan.hardware.detect import detect
from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware, Host, Rates, Reading

__all__ = ["Accelerator", "Budget", "Deduction", "Hardware", "Host", "Rates", "Reading", "detect"]
