"""Turn published head scores into a head profile; ``vllm-kvzip import-scores`` does the same.

    python scripts/import_profile.py --model PATH --scores score.pt [score2.pt ...]
    python scripts/import_profile.py --model PATH --scores full_attention_heads.tsv
    python scripts/import_profile.py --model PATH --scores budgets.npy

See ``profiling/import_profile.py`` for what the files are.
"""

import sys

from vllm_kvzip.profiling.import_profile import main

if __name__ == "__main__":
    sys.exit(main())
