"""VAE tiling: a picture is decoded in overlapping tiles with blended seams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vramplan.pipeline.tiles import scaled_tiles
from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, Picture, Quality
from vramplan.workload import Workload

# Smaller tiles are visible: they have less than 8 latents of context on each side of a seam.
SMALLEST_TILE = 128
# The sizes tried, as shares of the class's own tile.
_SHARES = (1, 1 / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeTiling:
    """`vae.enable_tiling()` after the tile has been set to `tile` pixels on its shorter side.

    Blending changes pixels near the seams a little, and each tile is normalized separately: near lossless. `tile=0`
    keeps the tile of the VAE's class.
    """

    name: ClassVar[str] = "vae_tiling"
    axis: ClassVar[Axis] = "decode"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "near_lossless"
    leaves: ClassVar[tuple[str, ...]] = ("tile_", "use_tiling")

    tile: int = 0

    @classmethod
    def variants(cls, vae: Component, workload: Workload) -> Iterable[Self]:
        """The class's own tile and a smaller one, if they cut this picture."""
        if vae.tiling is None:
            return
        for share in _SHARES:
            wanted = vae.tiling.side * share
            tile = next((side for side in vae.tiling.sides if side <= wanted), 0)
            if tile >= min(SMALLEST_TILE, vae.tiling.side) and vae.tiling.acts(workload.height, workload.width, tile):
                yield cls(tile=tile)

    def refusal(self, vae: Component, workload: Workload) -> str | None:
        """Refuse classes without tiling, uneven tiles, and tiles that do not cut the picture."""
        if vae.tiling is None:
            return f"{vae.class_name} has no tiling"
        tile = self.tile or vae.tiling.side
        if tile not in vae.tiling.sides:
            near = sorted(vae.tiling.sides, key=lambda side: abs(side - tile))[:3]
            return (
                f"tiles of {tile} px do not overlap evenly in {vae.class_name} and would change the picture's "
                f"size: use {', '.join(map(str, near))}"
            )
        if not vae.tiling.acts(workload.height, workload.width, tile):
            return (
                f"a tile of {tile} px does not cut a picture of {workload.width} x {workload.height}: "
                "tiling would do nothing; give a smaller tile"
            )
        return None

    def shrink(self, picture: Picture, vae: Component) -> Picture:
        """One tile at a time; VAEs of videos process all frames of a tile together."""
        if vae.tiling is None:  # a VAE of sound in a pipeline with one of pictures
            return picture
        scale = (self.tile or vae.tiling.side) / vae.tiling.side
        return replace(
            picture,
            height=min(picture.height, int(vae.tiling.height * scale)),
            width=min(picture.width, int(vae.tiling.width * scale)),
        )

    def apply(self, pipe: Any, names: Sequence[str]) -> None:
        """Scale all spatial tile attributes together, then enable tiling on the VAE itself.

        A stride longer than the tile would leave gaps.
        """
        for name in names:
            vae = pipe.components[name]
            for attribute, value in scaled_tiles(vae, self.tile).items():
                setattr(vae, attribute, value)
            vae.enable_tiling()

    def code(self, names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
        """One line for each tile attribute, then the call."""
        lines = []
        for name in names:
            tiles = scaled_tiles(modules[name], self.tile)
            lines += [f"pipe.{name}.{attribute} = {value}" for attribute, value in tiles.items()]
            lines.append(f"pipe.{name}.enable_tiling()")
        return lines
