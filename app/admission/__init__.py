"""Who is let in, and who goes next: bounded queues, fair shares between tenants, refusal in time."""
