"""What does compression cost a model's answers? ``vllm-kvzip evaluate`` does the same.

    python scripts/eval_quality.py --model MODEL --max-loss 0.05
    python scripts/eval_quality.py --model MODEL --text report.txt --tasks facts open
    python scripts/eval_quality.py --model tests/models/tiny-retriever --scorers kvzip \\
        --modes evict quantize mixed --keep-bytes-ratios 0.5 0.25 0.125 0.0625

See ``evaluation/quality/evaluate.py`` for what is measured, and ``--help`` for every flag.
"""

import sys

from vllm_kvzip.evaluation.quality.command import main

if __name__ == "__main__":
    sys.exit(main())
