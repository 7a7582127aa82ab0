"""Who is calling, what they may do and have left, and what they used."""
