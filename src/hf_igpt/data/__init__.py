"""From images to tokens: the sources of images, how they are read, and the rows and batches that a model trains on.

`arguments` flags · `sources` splits · `images` files and cells · `tokens` cache, rows, streams, collators · `prepare` `TrainingImages`.
"""

import lazy_loader


# The names are in `__init__.pyi`, and imported when they are first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
