"""Models by name: fetched, added, cached."""
