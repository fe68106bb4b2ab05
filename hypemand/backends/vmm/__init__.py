"""Guests of small virtual machine monitors: a process for each, with an HTTP API on a unix socket.

What `hypemand.backends.cloud_hypervisor` and `hypemand.backends.firecracker`
share. Such a VMM pauses, saves memory and devices to files, and resumes; its
disks are files of ours to copy while the guest stands still.
"""
