"""The simulated accelerator: a pipeline's whole call, with its real hooks, on a device that is not there."""
