"""What happened, for those who run the service: traces and log lines of every process, never a prompt, never a key."""
