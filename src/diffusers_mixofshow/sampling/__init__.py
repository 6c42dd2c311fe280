"""Draw pictures as ``mixofshow sample`` does: its settings, the drawing, and how pictures store their settings."""
