"""Name the files of a run, remove those of an older run, and keep other files out of sealed folders. This is the one list of them.

A folder of `twotower run` has `PARTS` and `REPORTS`; the files of the training are in its part `model`. A folder of
`twotower train` has the files of the training itself, and a bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from twotower.errors import DataError

PARTS = ("dataset", "model", "bundle")
REPORT, REPORT_PAGE, REPORT_BEFORE = "report.json", "report.html", "report_before_update"
REPORTS = (REPORT, REPORT_PAGE, REPORT_BEFORE)
MANIFEST, BEGIN = "manifest.json", "start.pt"
CHECKPOINTS = ("best.pt", "last.pt")
OF_A_TRAINING = (MANIFEST, *CHECKPOINTS, BEGIN, "metrics.jsonl", "tensorboard", "recipe", "recipe.json")
OF_A_RUN = (*PARTS, *REPORTS, *OF_A_TRAINING)
"""All that the commands `train`, `run`, `evaluate` and `update` write into the folder of a run."""
PRECIOUS = ("model", "bundle", MANIFEST, *CHECKPOINTS, REPORT, REPORT_BEFORE)
"""What `train` replaces only with --overwrite. It replaces its log in any case: a training that was killed early left only that."""


def remove_parts(folder: Path, names: Iterable[str]) -> None:
    """Remove files and folders of a run; what is missing is passed over.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "tensorboard").mkdir(); _ = (folder / "best.pt").write_text(""); _ = (folder / "mine").write_text("")
    >>> remove_parts(folder, OF_A_RUN)
    >>> [path.name for path in folder.iterdir()]
    ['mine']
    """
    for path in [folder / name for name in names]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def keep_sealed(out: Path) -> None:
    """Refuse a path inside a bundle or a dataset: the manifest of such a folder lists its files, and no other may be there.

    Raises
    ------
    DataError
        A folder above `out` has a manifest with hashes.
    """
    for folder in out.absolute().parents:
        try:
            manifest = (folder / MANIFEST).read_bytes()
        except OSError:
            continue
        if all(key in manifest for key in (b'"format"', b'"hashes"', b'"kind"')):
            raise DataError(
                f"{out} is inside {folder}, which may hold only the files that its manifest lists. Choose another path."
            )
