"""What lasts: schedules, the run log, and how both are written so that they survive."""
