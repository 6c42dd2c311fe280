"""Drawing pictures as ``mixofshow sample`` does: what decides about them, the drawing, and what they tell of it."""
