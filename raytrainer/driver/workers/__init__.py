"""Where workers come from and how they are spoken to: in this process, or as Ray actors that stay warm."""
