"""YAML and overrides into dataclasses, and what a wrong one is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vidistill import checkpoint
from vidistill.conditioning.camera import CameraConfig
from vidistill.config import ConfigError, build, differences, load_config
from vidistill.schedules import ScheduleConfig
from vidistill.training.config import TrainConfig, recipe


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rates: tuple[float, ...] = (1.0,)
    pair: tuple[int, int] = (1, 2)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.1
    steps: int = 10
    active: bool = False
    init: str | None = None
    folder: Path = Path("out")
    inner: Inner = field(default_factory=Inner)
    sites: Mapping[str, Inner] = field(default_factory=dict)


def write(folder, name="a.yaml", text=""):
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_and_overrides_become_a_dataclass(tmp_path):
    path = write(tmp_path, text="name: x\nrate: 1e-3\ninner: {rates: [1, 0.5]}\nsites: {qk: {width: 9}}\n")
    cfg = load_config(Outer, path, ["steps=1e4", "inner.width=7", "init=some/where", "active=true"])
    inner = Inner(7, (1.0, 0.5))
    assert cfg == Outer("x", 1e-3, 10_000, True, "some/where", inner=inner, sites={"qk": Inner(9)})
    assert isinstance(cfg.steps, int) and isinstance(cfg.inner.rates[0], float)


def test_a_base_gives_what_a_file_leaves_out(tmp_path):
    write(tmp_path, "root.yaml", "name: root\nrate: 1.0\ninner: {width: 2, pair: [3, 4]}\n")
    write(tmp_path, "middle.yaml", "base: root.yaml\nname: middle\n")
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", "top.yaml", "base: ../middle.yaml\ninner: {width: 5}\n")
    cfg = load_config(Outer, path)
    assert cfg == Outer("middle", 1.0, inner=Inner(5, pair=(3, 4)))


def test_bases_that_go_in_a_circle_are_refused(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    path = write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: b.yaml -> a.yaml -> b.yaml"):
        load_config(Outer, path)


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "teacher.yaml")
    with pytest.raises(FileNotFoundError, match=r"mean teacher\.yaml"):
        load_config(Outer, tmp_path / "techer.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nrte: 1", "rte.*rate"),
        ("name: x\ninner: {widht: 1}", r"unknown key inner.widht.*mean inner\.width"),
        ("name: x\nzzz: 1", "zzz.*name, rate"),
        ("rate: 1", "name.*required"),
        ("name: null", "name.*None"),
        ("name: x\nrate: fast", "rate.*'fast'"),
        ("name: x\nrate: .nan", "rate.*nan"),
        ("name: x\nrate: true", "rate.*True"),
        ("name: x\nsteps: 1.5", "steps.*1.5"),
        ("name: x\nsteps: true", "steps.*True"),
        ("name: x\nactive: 1", "active.*1"),
        ("name: x\ninner: 3", "inner must.*got 3"),
        ("name: x\ninner: {rates: 3}", r"inner\.rates.*list.*3"),
        ("name: x\ninner: {rates: [a]}", r"inner\.rates\[0\].*number"),
        ("name: x\ninner: {pair: [1]}", r"inner\.pair must hold 2 values, got 1"),
        ("name: x\ninner: {width: 0}", "width.*1, got 0"),
        ("name: x\nsites: {qk: {width: -1}}", r"sites\.qk: width.*1"),
        ("name: x\nsites: 1", "sites.*got 1"),
        ("name: [x", "not valid YAML"),
        ("- a\n- b", "not merge|must hold"),
        ("name: ${nowhere}", "nowhere"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, write(tmp_path, text=text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rate", "key=value"),
        ("rat=1", "mean rate"),
        ("rate=[1", "not valid YAML"),
        ("inner=1", "inner.*got 1"),
    ],
)
def test_a_wrong_override_is_told_what_is_wrong(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, ["name=x", override])


def test_sizes_of_networks_are_checked_where_they_are_read():
    base = ["name=x", "objective=flow", "data=d"]
    for override, message in (
        ("dit.heads=0", "dit"),
        ("dit.width=-8", "dit"),
        ("dit.layers=-1", "dit"),
        ("student.chunk=0", "student.chunk must be at least 1"),
        ("student.memory.frames=0", "memory needs frames >= 1"),
        ("student.memory.stretch=0", "must be above 0"),
        ("schedule.levels=[0.5]", r"starts from pure noise"),
        ("schedule.pattern=9", "asks for 9 steps"),
        ("codec_config.latent_channels=0", "must be >= 1"),
        ("optim.lr=0", "lr > 0"),
        ("loss.noise.shift=0", "must be positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(TrainConfig, None, [*base, override])


def test_every_config_of_the_repository_loads():
    folder = Path(__file__).parents[2] / "configs"
    stages = [p for p in sorted(folder.glob("*/*.yaml")) if "objective:" in p.read_text() or "base:" in p.read_text()]
    assert stages
    for path in stages:
        load_config(TrainConfig, path)


def test_former_names_of_fields_are_read_and_both_names_of_one_are_refused():
    old = {"schedule": {"levels": [1.0, 0.5], "steps": [[1.0, 0.5]], "told": [[0.9, 0.4]]}, "loss": {"broken": 0.5}}
    cfg = build(
        TrainConfig, {"name": "x", "objective": "dmd", "data": "d", "teacher": "t", **old, "watch": {"judge_every": 0}}
    )
    assert cfg.schedule.timesteps == ((0.9, 0.4),) and cfg.loss.invalid_weight == 0.5 and cfg.validation.every == 0
    with pytest.raises(ConfigError, match=r"schedule\.told.*former.*schedule\.timesteps"):
        build(TrainConfig, {"name": "x", "objective": "flow", "data": "d", "schedule": {"told": [], "timesteps": []}})


@pytest.mark.parametrize("name", sorted(set(checkpoint.zoo_names().values())))
def test_every_bundled_record_is_built_by_its_present_names(name):
    record = checkpoint.read_record(checkpoint.locate(name))
    if "schedule" in record:
        assert len(build(ScheduleConfig, record["schedule"]).levels) > 0
    camera = (record.get("world") or {}).get("camera")
    assert camera is None or build(CameraConfig, camera).sites
    stage = {key: value for key, value in record["card"]["train"].items() if key not in ("validation", "watch")}
    assert build(TrainConfig, stage).name


def test_differences_are_what_is_not_at_its_default():
    assert differences(Outer("x")) == {"name": "x"}
    assert differences(Outer("x", steps=20, inner=Inner(width=7))) == {"name": "x", "steps": 20, "inner": {"width": 7}}


def test_a_recipe_is_all_that_weights_depend_on():
    own = {"name": "x", "objective": "flow", "data": "data/x"}
    same = recipe(build(TrainConfig, own))
    assert recipe(build(TrainConfig, own | {"loss": {"drop": 0.1}, "threads": 1, "out": "elsewhere"})) == same
    for other in ({"loss": {"drop": 0.2}}, {"seed": 1}, {"steps": 999}, {"optim": {"lr": 2e-4}}, {"data": "data/y"}):
        assert recipe(build(TrainConfig, own | other)) != same
    sites = {"modulation": {"dim": 3}, "hidden": {"dim": 5}}
    turned = dict(reversed(sites.items()))
    assert len({recipe(build(TrainConfig, own | {"dit": {"sites": s}})) for s in (sites, turned)}) == 1
