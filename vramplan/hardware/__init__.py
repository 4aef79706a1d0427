"""Detect a machine: accelerators, host memory, disk, and the memory of each that may be used."""

from vramplan.hardware.detect import detect
from vramplan.hardware.rates import Rates
from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware, Host, Reading

__all__ = ["Accelerator", "Budget", "Deduction", "Hardware", "Host", "Rates", "Reading", "detect"]
