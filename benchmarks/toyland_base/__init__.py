"""How Toyland's base was trained, written and graded, and further instances of its world for studies."""
