"""The whole engine in virtual time, on a disk, a hypervisor and a clock that misbehave; replayed from a seed."""
