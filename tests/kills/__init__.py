"""Real daemons, killed and hung at every step of a run; then is looked whether all is as promised. See `__main__`."""
