"""``mixofshow ui``: a page in the browser to load concepts, draw regions by hand, sample, fuse, and look into files.

The page is made with Gradio, from the extra ``ui``; `actions` does the work, and does not depend on Gradio.
"""
