"""How near the engine as served is to the model as published."""
