"""What the machine does while a run trains: a thread that looks twice a second, and what its readings add up to."""
