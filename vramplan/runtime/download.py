"""Where a plan's repository lies on this machine, or how to get it there. Nothing is downloaded."""

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


def downloaded(plan: Plan, source: Hub) -> Path:
    """The snapshot of the plan's repository in the hub's cache, at the plan's commit and complete.

    Raises:
        VramplanError: it is not there, or not all of it; the message is the command that downloads it.
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
    """The command that downloads what loading the plan's pipeline takes: weights, configurations, tokenizers."""
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
    """What of the pipeline is not in the folder: the first part of it, in a few words."""
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
