"""Measurements of this machine: stored after a call or by `vramplan calibrate`, used by the next plan."""
