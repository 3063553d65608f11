"""What is made ready before a run: the given data told apart, Ray Datasets, learning rates and batch sizes."""
