"""Run a pipeline's call, with its real hooks, on a simulated accelerator and report the memory it would use."""
