"""Build a head profile of a model, offline; ``vllm-kvzip profile`` does the same.

    python scripts/profile_heads.py --model PATH [--out profiles/NAME.json] [--text FILE ...]
        [--overwrite]

See ``profiling/profile_heads.py`` for what is done, and ``--help`` for every flag.
"""

import sys

from vllm_kvzip.profiling.command import main

if __name__ == "__main__":
    sys.exit(main())
