"""Write the packaged calibration text, evaluation text and questions: ``python scripts/make_corpus.py``.

The files are a function of `corpus.packaged` alone; `tests/scripts/test_corpus.py` checks that they are up to date.
"""

from __future__ import annotations

from pathlib import Path

import ptqbench.data
from corpus import packaged

FOLDER = Path(ptqbench.data.__file__).parent / "embedded"


def main() -> None:
    """Write every packaged file."""
    FOLDER.mkdir(exist_ok=True)
    for name, content in packaged.packaged().items():
        (FOLDER / name).write_bytes(content.encode())
        print(f"{FOLDER / name}: {len(content)} characters")


if __name__ == "__main__":
    main()
