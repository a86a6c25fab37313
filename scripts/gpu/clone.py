"""Import it first: it makes the package whole where a clone is used without being installed.

Some folders of the package lie elsewhere in a clone, see ``package-dir`` in ``pyproject.toml``. A
machine that has torch and Triton alone has nothing installed that would know.
"""

from pathlib import Path

import vllm_kvzip

ROOT = Path(__file__).parents[2]

for _folder in (ROOT, ROOT / "scripts"):
    if str(_folder) not in vllm_kvzip.__path__:
        vllm_kvzip.__path__.append(str(_folder))
