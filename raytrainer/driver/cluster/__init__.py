"""The Ray cluster: found or started, attached to, sent the user's modules, and asked for places."""
