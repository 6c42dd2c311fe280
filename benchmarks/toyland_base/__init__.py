"""How Toyland's base was trained, written and graded; see `weights/README.md` in the package."""
