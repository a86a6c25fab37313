"""Serve a model without and with compression, ask both the same, and show the difference.

    python scripts/demo.py
    python scripts/demo.py --tiny

The model is SmolLM2-135M-Instruct (``real_model.py``), which is asked about English prose; see
``demos/text.py``. Where it cannot be had, or with ``--tiny``, a tiny test model is asked for words
instead; see ``demos/words.py``.
"""

from __future__ import annotations

import argparse
import sys

from real_model import ModelUnavailable, real_model

from demos.text import text_demo
from demos.words import words_demo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="use the tiny model that ships")
    if parser.parse_args().tiny:
        return words_demo()
    try:
        model = real_model()
    except ModelUnavailable as error:
        print(f"This demo runs on a tiny test model, because no real one can be had: {error}\n")
        return words_demo()
    return text_demo(model)


if __name__ == "__main__":
    sys.exit(main())
