"""What commands print is their own: no line of a library that the user did not ask for.

Called by the entry scripts first of all; in notebooks and other programs libraries stay as they are.
"""

import os
import sys


def own_lines_only() -> None:
    """For this process and those that it starts; what the user has set in the environment stays.

    transformers imports torchao wherever it is installed, because its list of quantizers is imported whole. Nothing here uses
    torchao, and its import prints which of its GPU extensions do not load and warns of its own enums: for transformers it is
    not installed. Bars of datasets and of transformers are for a terminal; in a log each step of theirs is a line.
    """
    sys.modules.setdefault("torchao", None)
    if not sys.stderr.isatty():
        for library in ("HF_DATASETS", "HF_HUB"):  # transformers follows the hub's
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
