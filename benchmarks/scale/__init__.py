"""Speed and scale, side by side: a module for each figure. ``python -m benchmarks`` is the door."""
