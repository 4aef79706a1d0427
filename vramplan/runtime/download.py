"""Find a plan's repository on this machine, or the command that downloads it. Nothing is downloaded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from vramplan.errors import VramplanError
from vramplan.pipeline.folder import INDEX, read_index, stored_weights
from vramplan.pipeline.hub import cached_snapshot
from vramplan.pipeline.repository import FolderRepository
from vramplan.pipeline.sources import Hub
from vramplan.planfile.types import Plan


def downloaded_snapshot(plan: Plan, source: Hub) -> Path:
    """Return the complete snapshot of the plan's repository in the hub's cache, at the plan's commit.

    Raises:
        VramplanError: it is missing or incomplete; the message has the command that downloads it.
    """
    folder = cached_snapshot(source.repo_id, source.revision or "main")
    if folder is None:
        missing = "it is not in the hub's cache"
    else:
        missing = next(_missing(plan, folder), "")
        if not missing:
            return folder
    raise VramplanError(f"{source.repo_id}: {missing}; download it with: {download_command(plan, source)}")


def download_command(plan: Plan, source: Hub) -> str:
    """The command that downloads all files needed to load the plan's pipeline: weights, configurations, tokenizers."""
    weights = [
        f"{record.name}/*{f'.{record.variant}*' if record.variant else ''}.safetensors"
        for record in plan.model.components
    ]
    wanted = [INDEX, "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", *weights]
    return shlex.join(
        [
            "hf",
            "download",
            source.repo_id,
            "--revision",
            str(source.revision),
            *(part for item in wanted for part in ("--include", item)),
        ]
    )


def _missing(plan: Plan, folder: Path) -> Iterator[str]:
    """Yield a few words for each part of the pipeline that is missing in the folder."""
    repository = FolderRepository(folder)
    for name, entry in read_index(repository).items():
        if isinstance(entry, list) and None not in entry and not name.startswith("_") and not repository.names(name):
            yield f"its {name} is not in the hub's cache"
    for record in plan.model.components:
        try:
            if stored_weights(repository, record.name, record.variant) is None:
                yield f"the weights of its {record.name} are not in the hub's cache"
        except VramplanError as error:
            yield str(error)
