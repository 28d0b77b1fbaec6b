"""Geometry of a Doom map: which sector has a point, and the normals of what a view shows.

A map is flat: sectors are polygons of lines ``(x1, y1, x2, y2)``, with a floor and a ceiling. One
map unit is 1/32 m.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

# Classes of pixels, in the order of their numbers.
CLASSES = ("wall_or_sky", "floor", "ceiling", "monster", "pickup", "scenery")
WALL, FLOOR, CEILING, MONSTER, PICKUP, SCENERY = range(len(CLASSES))
DEPTH_UNIT = 8.0  # map units of one step of the depth buffer
NEAREST = 4  # map units; nothing is drawn closer to the camera


def sector_of(point: np.ndarray, lines: np.ndarray, owner: np.ndarray) -> int:
    """Return the sector that has the point, -1 outside the map or where sectors overlap.

    A ray to the right crosses the border of that sector an odd number of times.

    point: ``(2,)``; lines: ``(n, 4)``; owner: ``(n,)``, the sector of each line.
    """
    x1, y1, x2, y2 = lines.T
    meets = (y1 > point[1]) != (y2 > point[1])
    with np.errstate(all="ignore"):  # a horizontal line divides by zero, and never meets
        x = x1 + (point[1] - y1) / (y2 - y1) * (x2 - x1)
    inside = np.flatnonzero(np.bincount(owner[meets & (x > point[0])]) % 2)
    return int(inside[0]) if len(inside) == 1 else -1


def distance(point: np.ndarray, lines: np.ndarray) -> float:
    """Return the distance from the point to the nearest line."""
    start, along = lines[:, :2], lines[:, 2:] - lines[:, :2]
    share = ((point - start) * along).sum(1) / ((along * along).sum(1) + 1e-9)
    nearest = start + np.clip(share, 0, 1)[:, None] * along
    return float(np.hypot(*(nearest - point).T).min())


def walls(lines: np.ndarray, owner: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Return the lines with a visible wall: on one side only, or with a step between sectors.

    heights: ``(sectors, 2)``, floor and ceiling.
    """
    keys = [tuple(sorted([(x1, y1), (x2, y2)])) for x1, y1, x2, y2 in lines]
    sides = defaultdict(list)
    for key, sector in zip(keys, owner, strict=True):
        sides[key].append(tuple(heights[sector]))
    return lines[[len(sides[key]) == 1 or len(set(sides[key])) > 1 for key in keys]]


def normals(
    classes: np.ndarray, depth: np.ndarray, lines: np.ndarray, position: np.ndarray, angle: float
) -> np.ndarray:
    """Return the unit normal of each pixel, ``(H, W, 3)``: x right, y down, z forward.

    Floors and ceilings are level, and sprites face the camera. A pixel of a wall has the normal of
    the line that its ray meets at its depth; where none does (sky, far walls), it is zero.

    classes, depth: ``(H, W)``; the field of view is 90 degrees. lines: of the walls. position:
    ``(2,)``; angle: degrees, counter-clockwise from the x axis.
    """
    height, width = classes.shape
    found = np.zeros((height, width, 3), np.float32)
    start_x, start_z = _in_camera(lines[:, :2] - position, angle)
    end_x, end_z = _in_camera(lines[:, 2:] - position, angle)
    along_x, along_z = end_x - start_x, end_z - start_z
    length = np.hypot(along_z, -along_x) + 1e-9
    normal_x, normal_z = along_z / length, -along_x / length
    far = depth.astype(np.float32) * DEPTH_UNIT
    for column in range(width):
        # The ray (slope, 1) meets the line where start + share * along is on it.
        slope = (column + 0.5 - width / 2) / (width / 2)
        across = along_x - slope * along_z
        crosses = np.abs(across) > 1e-6
        share = (slope * start_z - start_x) / np.where(crosses, across, 1)
        z = start_z + share * along_z
        met = np.flatnonzero(crosses & (share >= 0) & (share <= 1) & (z > NEAREST))
        if not len(met):
            continue
        own = far[:, column]
        line = met[np.abs(z[met] - own[:, None]).argmin(1)]
        # The depth buffer is coarse, and coarser far away.
        close = np.abs(z[line] - own) < DEPTH_UNIT * 1.5 + 0.03 * own
        x, z = normal_x[line], normal_z[line]
        to_camera = -np.sign(x * slope + z)
        rows = close & (classes[:, column] == WALL)
        found[rows, column] = np.stack([x * to_camera, 0 * x, z * to_camera], 1)[rows]
    found[classes == FLOOR] = (0, -1, 0)
    found[classes == CEILING] = (0, 1, 0)
    found[classes >= MONSTER] = (0, 0, -1)
    return found


def _in_camera(points: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return x to the right and z forward of points ``(n, 2)`` relative to the camera."""
    radians = np.deg2rad(angle)
    forward = np.array([np.cos(radians), np.sin(radians)])
    right = np.array([np.sin(radians), -np.cos(radians)])
    return points @ right, points @ forward
