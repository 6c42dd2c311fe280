"""``mixofshow ui``: a page in the browser to load concepts, draw regions by hand, sample, fuse, and look into files.

The page is Gradio's, from the extra ``ui``; what it does is in functions that know nothing of it.
"""
