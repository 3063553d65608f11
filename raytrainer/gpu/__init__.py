"""NVIDIA GPUs through NVML: which there are, which are free, what they hold. Never starts CUDA."""
