"""What runs in an actor's process around a worker: Ray's side of it, its output, its GPUs."""
