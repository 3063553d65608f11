"""The fit loop on the driver: what workers do next, what they report, and how it goes on when some are lost."""
