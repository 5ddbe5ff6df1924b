"""Pixel fields of some of the rows of a batch, whichever way a processor lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

# One entry for each row, whatever its images are.
_PER_ROW = ("token_type_ids", "mm_token_type_ids")
# One entry for each image, as long as there are as many entries as images; else one for each row.
_PER_IMAGE = ("pixel_values", "image_sizes", "image_position_ids")


def fields_of_rows(
    fields: Mapping[str, Any], rows: Sequence[int], images: Sequence[Sequence[Any] | None] | None, num_rows: int
) -> Mapping[str, Any] | None:
    """
    The fields of some rows; `None` where it cannot be told which pixels belong to which row (tiles).

    Args:
        fields (`Mapping[str, Any]`):
            What a processor returned beside token ids: tensors, arrays or lists.
        rows (`Sequence[int]`):
            The rows, ascending.
        images (`Sequence` or `None`):
            Images of each row.
        num_rows (`int`):
            Rows of all fields.
    """
    if len(rows) == num_rows or not fields:
        return fields
    num_images = [len(of_row or ()) for of_row in images] if images is not None else [0] * num_rows
    cut = {name: _rows_of(fields[name], rows) for name in fields if name in _PER_ROW}
    rest = {name: value for name, value in fields.items() if name not in cut}
    if "spatial_shapes" in rest or "num_tiles" in rest:
        return None
    if "image_grid_thw" in rest:
        grids = {name: _as_tensor(value) for name, value in rest.items()}
        by_row = split_pixel_values_by_grid(grids | {"num_images": num_images})
        merged = unsplit_pixel_values_by_grid({name: [by_row[name][row] for row in rows] for name in grids})
        return cut | (merged if len(merged["image_grid_thw"]) else {})
    first_images = np.cumsum([0, *num_images]).tolist()
    of_images = [image for row in rows for image in range(first_images[row], first_images[row + 1])]
    for name, value in rest.items():
        if name in _PER_IMAGE and len(value) == first_images[-1]:
            cut[name] = _rows_of(value, of_images)
        elif len(value) == num_rows:
            cut[name] = _rows_of(value, rows)
        else:
            return None
    has_pixels = "pixel_values" not in cut or len(cut["pixel_values"]) > 0
    return cut if has_pixels else {name: value for name, value in cut.items() if name in _PER_ROW}


def _rows_of(value: Any, rows: Sequence[int]) -> Any:
    return value[list(rows)] if isinstance(value, torch.Tensor | np.ndarray) else [value[row] for row in rows]


def _as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.array(value))
