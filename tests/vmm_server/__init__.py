"""A stand-in for Cloud Hypervisor and Firecracker, which can't run where there is no KVM. `server.py` is a program."""
