"""A page that shows what compression kept of a document: plain Python, and a browser's script."""
