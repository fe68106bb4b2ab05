"""What happens when: the scheduler, runs, recovery, and the config's way into the store."""
