"""The disaggregated memory pool (after EMS): KV blocks by content name, shared by all workers."""
