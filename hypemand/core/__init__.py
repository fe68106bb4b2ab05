"""The rules: pure functions and values. No trio, no clock, no I/O, no logging."""
