"""CarRacing of Gymnasium as a world to play: four keys, a car that a keyboard can hold, starts all along the track."""

import math
from typing import Any

import numpy as np

ID = "Drive-v0"  # for `--env vidistill.worlds.drive.env:Drive-v0`
KEYS = ("steer_left", "steer_right", "gas", "brake")
STEPS, RATE = 3, 50.0  # of the physics: a frame, a second
LOCK, GAS, BRAKE = (
    0.28,
    0.16,
    0.12,
)  # a key held: front wheels in rad (CarRacing: 0.4), share of the power, of the brake
ROLL = 0.012  # brake while no gas is given: the car comes to rest by itself, as CarRacing's does not
TOP, FADE = 30.0, 6.0  # units a second at which gas does nothing, and over which it fades before
SQUARE, SIDE = (150, 0, 700, 700), 128  # px of CarRacing's 1000x800 drawing, above its bar of numbers; and of a picture
SEEN = 60.0  # units from the car, east to west or north to south, beyond which nothing reaches into the picture
GRASS = 2000 / 6 / 20  # units along a square of lighter grass; the next one is as far away


def make_game(**options: Any) -> Any:
    """CarRacing that draws only when it is asked to: the square above its bar, no more road than it shows."""
    import pygame
    from gymnasium.envs.box2d.car_racing import CarRacing

    class Game(CarRacing):
        def _render(self, mode: str) -> Any:
            return super()._render(mode) if mode == "rgb_array" else None

        def _render_road(self, *view: Any) -> None:
            car: Any = self.car
            surface: Any = self.surf
            eye = car.hull.position
            surface.fill(self.bg_color)
            corners = np.array([poly[0] for poly, _ in self.road_poly])
            near = (np.abs(corners - eye).max(1) < SEEN).nonzero()[0]
            grass = [(square, self.grass_color) for square in grass_near(*eye)]
            for poly, color in grass + [self.road_poly[k] for k in near]:
                self._draw_colored_polygon(surface, poly, [int(c) for c in color], *view)

        def _render_indicators(self, *_: Any) -> None:
            """Nothing: the square ends above them."""

        def _create_image_array(self, screen: Any, _: Any) -> np.ndarray:
            small = pygame.transform.smoothscale(screen.subsurface(SQUARE), (SIDE, SIDE))
            return np.ascontiguousarray(pygame.surfarray.array3d(small).swapaxes(0, 1))

    return Game(render_mode="rgb_array", **options)


def make_drive(render_mode: str | None = None, **options: Any) -> Any:
    """The environment; `options` are CarRacing's. Actions: a switch for each of KEYS; observations: see `observed`."""
    import gymnasium

    class Drive(gymnasium.Env):
        metadata = {"render_modes": ["rgb_array"], "render_fps": RATE / STEPS}  # noqa: RUF012
        action_space = gymnasium.spaces.MultiBinary(len(KEYS))
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (6,), np.float64)

        def __init__(self, render_mode: str | None = None) -> None:
            self.render_mode, self.game = render_mode, make_game(**options)

        def get_action_meanings(self) -> list[str]:
            return list(KEYS)

        def get_keys_to_action(self) -> dict[tuple[str, ...], np.ndarray]:
            arrows = ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown")
            return {(arrow,): row for arrow, row in zip(arrows, np.eye(len(KEYS), dtype=np.int8), strict=True)}

        @property
        def track(self) -> np.ndarray:
            """Tiles of the road [N, 3]: angle of its left side's normal, x, y."""
            return np.array(self.game.track)[:, 1:]

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
            self.game.reset(seed=seed)
            set_down(self.game, self.track)
            return observed(self.game), {}

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            over = False
            for _ in range(STEPS):
                _, _, ended, _, _ = self.game.step(controls(action, observed(self.game)[3]))
                over = over or ended
            return observed(self.game), 0.0, over, False, {}

        def render(self) -> Any:
            return self.game.render()

        def close(self) -> None:
            self.game.close()

    return Drive(render_mode)


def register() -> None:
    """Make the environment known to Gymnasium as ID."""
    import gymnasium

    gymnasium.register(ID, make_drive)


def grass_near(x: float, y: float) -> list[list[tuple[float, float]]]:
    """The corners of the squares of lighter grass around a place."""
    reach = math.ceil(SEEN / GRASS / 2)
    columns, rows = (2 * round(at / GRASS / 2) for at in (x, y))
    cells = range(-2 * reach, 2 * reach + 1, 2)
    corners = ((1, 0), (0, 0), (0, 1), (1, 1))
    return [[(GRASS * (columns + i + a), GRASS * (rows + j + b)) for a, b in corners] for i in cells for j in cells]


def set_down(game: Any, track: np.ndarray) -> None:
    """Put a new car anywhere on the track, headed either way, at any speed; the zoom of the first second is over."""
    from gymnasium.envs.box2d.car_dynamics import Car

    rng = game.np_random
    angle, x, y = track[rng.integers(len(track))]
    beside = rng.uniform(-4, 4)
    angle, x, y = angle + rng.choice([0, math.pi]), x + beside * math.cos(angle), y + beside * math.sin(angle)
    angle += rng.normal(0, 0.15)
    game.t = 1.0
    game.car.destroy()
    game.car = Car(game.world, angle, x, y)
    speed = max(0.0, rng.uniform(-8, 26))
    velocity = (-math.sin(angle) * speed, math.cos(angle) * speed)
    game.car.hull.linearVelocity = velocity
    for wheel in game.car.wheels:
        wheel.linearVelocity, wheel.omega = velocity, speed / wheel.wheel_rad


def observed(game: Any) -> np.ndarray:
    """Where the car is: x, y, angle, speed along the angle, yaw rate, and whether a wheel is on the road."""
    hull = game.car.hull
    angle, (vx, vy) = hull.angle, hull.linearVelocity
    on_road = any(wheel.tiles for wheel in game.car.wheels)
    speed = -math.sin(angle) * vx + math.cos(angle) * vy
    return np.array([*hull.position, angle, speed, hull.angularVelocity, on_road])


def controls(keys: Any, speed: float) -> np.ndarray:
    """CarRacing's steering, gas and brake for keys that are held at a speed."""
    left, right, gas, brake = (float(key) for key in keys)
    power = gas * GAS * min(1.0, max(0.0, (TOP - speed) / FADE))
    return np.array([LOCK * (right - left), power, BRAKE * brake if brake else ROLL * (not gas)])


register()
