"""Views of one map from random places, as ViZDoom's engine renders them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.quality import doom_geometry as geometry

if TYPE_CHECKING:
    from vizdoom import DoomGame, GameState

TRIES = 60  # places for each view, most of which are outside the map or too close to a wall
PICKUPS = {"Health", "Ammo", "Armor", "Weapon", "Key", "Powerup", "Item", "Inventory"}
FLAT = 1  # label of floors and ceilings; walls and sky have 0, sprites have more
HEADROOM, ELBOWROOM = 64, 32  # map units around a camera
# The screen is rendered at twice the size and cut to these rows.
ROWS = slice(8, 232)


class Map(NamedTuple):
    """A map; its number is also the seed of its views."""

    number: int
    wad: str
    name: str
    split: int


class View(NamedTuple):
    """An image and its dense labels, 112 x 160."""

    image: np.ndarray  # (H, W, 3) uint8
    seg: np.ndarray  # (H, W) uint8, geometry.CLASSES
    depth: np.ndarray  # (H, W) uint8, 1 = 8 map units; 0: none
    normal: np.ndarray  # (H, W, 3) int8, 127 times the unit vector; 0: none


def views_of(place: Map, count: int) -> Iterator[View]:
    """Yield up to this many views of a map, from random places between its walls."""
    with tempfile.TemporaryDirectory(prefix="doom-") as scratch:
        game = _game(place, Path(scratch))
        try:
            yield from _views(game, np.random.default_rng(place.number), count)
        finally:
            game.close()


def _views(game: DoomGame, random: np.random.Generator, count: int) -> Iterator[View]:
    sectors = _start(game).sectors
    lines = [(line.x1, line.y1, line.x2, line.y2) for s in sectors for line in s.lines]
    lines = np.array(lines, float)
    owner = np.repeat(range(len(sectors)), [len(s.lines) for s in sectors])
    heights = np.array([(s.floor_height, s.ceiling_height) for s in sectors])
    walls = geometry.walls(lines, owner, heights)
    found = 0
    for _ in range(count * TRIES):
        point = _beside(lines, random)
        sector = geometry.sector_of(point, lines, owner)
        if sector < 0 or np.subtract(*heights[sector, ::-1]) < HEADROOM:
            continue
        if geometry.distance(point, lines) < ELBOWROOM:
            continue
        game.send_game_command(f"warp {point[0]:.0f} {point[1]:.0f}")
        game.make_action([float(random.uniform(0, 360))], 3)
        state = game.get_state()
        if state is None or game.is_episode_finished():
            _start(game)
        elif _worth_it(state, point):
            yield _view(state, walls)
            found += 1
            if found == count:
                return


def _game(place: Map, scratch: Path) -> DoomGame:
    """Return a game without enemies' moves, whose only action is a turn.

    scratch: a folder for the engine's own settings, which it leaves in the current one otherwise.
    """
    import vizdoom

    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(Path(vizdoom.__file__).parent / place.wad))
    game.set_doom_config_path(str(scratch / "vizdoom.ini"))
    game.set_doom_map(place.name)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_labels_buffer_enabled(True)
    game.set_sectors_info_enabled(True)
    hidden = ("hud", "weapon", "crosshair", "decals", "particles", "effects_sprites", "messages")
    for what in hidden:
        getattr(game, f"set_render_{what}")(False)
    game.set_render_corpses(True)
    game.add_game_args("+cl_showsecretmessage 0 +con_midtime 0")
    game.set_window_visible(False)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_seed(place.number)
    game.set_episode_timeout(0)
    turn, variable = vizdoom.Button.TURN_LEFT_RIGHT_DELTA, vizdoom.GameVariable
    game.set_available_buttons([turn])
    game.set_button_max_value(turn, 0)  # no limit
    game.set_available_game_variables(
        [variable.POSITION_X, variable.POSITION_Y, variable.POSITION_Z, variable.ANGLE]
    )
    game.set_doom_skill(3)
    game.init()
    return game


def _start(game: DoomGame) -> GameState:
    game.new_episode()
    for cheat in ("god", "notarget", "freeze"):
        game.send_game_command(cheat)
    game.make_action([0], 2)
    return game.get_state()


def _beside(lines: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a point at some distance from a random line, on either side."""
    x1, y1, x2, y2 = lines[random.integers(len(lines))]
    share = random.uniform(0.1, 0.9)
    length = np.hypot(x2 - x1, y2 - y1) + 1e-6
    away = random.uniform(48, 400) * random.choice([-1, 1])
    x, y = x1 + share * (x2 - x1), y1 + share * (y2 - y1)
    return np.array([x - (y2 - y1) / length * away, y + (x2 - x1) / length * away])


def _worth_it(state: GameState, point: np.ndarray) -> bool:
    """Return whether the camera is at the point, and its view not blocked, shallow or dark."""
    there = np.abs(state.game_variables[:2] - point).max() <= 8
    depth = state.depth_buffer
    open_space = (depth <= 8).mean() <= 0.45 and depth.max() >= 25
    return bool(there and open_space and state.screen_buffer.mean() >= 18)


def _view(state: GameState, walls: np.ndarray) -> View:
    labels, depth = state.labels_buffer, state.depth_buffer
    x, y, _, angle = state.game_variables
    horizon = len(labels) // 2
    classes = np.zeros(labels.shape, np.uint8)
    classes[:horizon][labels[:horizon] == FLAT] = geometry.CEILING
    classes[horizon:][labels[horizon:] == FLAT] = geometry.FLOOR
    for sprite in state.labels:
        category = getattr(sprite, "object_category", "")
        kind = geometry.PICKUP if category in PICKUPS else geometry.SCENERY
        kind = geometry.MONSTER if category == "Monster" else kind
        classes[labels == sprite.value] = kind
    normal = geometry.normals(classes, depth, walls, np.array([x, y]), angle)
    rows = state.screen_buffer[ROWS]
    image = rows.reshape(len(rows) // 2, 2, -1, 2, 3).mean((1, 3)).round().astype(np.uint8)
    kept = (slice(ROWS.start, ROWS.stop, 2), slice(None, None, 2))
    return View(
        image, classes[kept], depth[kept].copy(), (normal[kept] * 127).round().astype(np.int8)
    )
