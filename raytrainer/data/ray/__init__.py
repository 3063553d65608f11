"""Ray Datasets: what the driver prepares, and how their rows get to the workers as batches."""
