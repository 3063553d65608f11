"""The state of a run on the driver: captured, kept as snapshots, written as checkpoints, resumed, brought home."""
