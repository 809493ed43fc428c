"""What every benchmark shares: timing, ceilings, the yardstick, models, peers and records."""
