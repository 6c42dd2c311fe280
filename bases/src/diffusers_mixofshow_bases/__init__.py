"""Further small base models of Toyland; each folder beside this file holds one in diffusers' layout."""
