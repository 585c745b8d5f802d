import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from tiny_text import write_world

from vidistill import checkpoint, cli
from vidistill.checkpoint import Bundle
from vidistill.config import load_config
from vidistill.evaluation import ablation
from vidistill.evaluation.ablation import AblationConfig, with_schedule
from vidistill.schedules import ScheduleConfig
from vidistill.training import trainer
from vidistill.training.config import TrainConfig


@pytest.fixture
def recipe(tmp_path):
    """A frontier over a tiny world: two tuned cells, two run by inference only."""
    root = write_world(tmp_path)
    stage = {
        "name": "diagonal", "objective": "dmd", "data": str(root / "latents"), "codec": str(root / "codec"),
        "frames": 9, "batch": 2,
        "init": str(root / "student"), "teacher": str(root / "teacher"), "critic_steps": 1,
        "student": {"chunk": 3, "memory": {"policy": "window", "frames": 6}},
        "schedule": {"levels": [1.0, 0.8, 0.5], "exit": "per_chunk"}, "loss": {"guidance": 2.0, "motion": 0.2},
    }  # fmt: skip
    (root / "stage.yaml").write_text(yaml.safe_dump(stage))
    text = {"clips": 2, "batch": 2, "probe": str(root / "probe"), "stride": 4, "out": ""}
    cells = {
        "321": {"pattern": "321"},
        "321-still": {"pattern": "321", "settings": ["loss.motion=0"]},
        "333-clean": {"pattern": "333", "context": "clean", "weights": "321"},
        "start": {"pattern": "222", "weights": "shared"},
    }
    whole = {"stage": str(root / "stage.yaml"), "steps": 2, "out": str(root / "out"), "cells": cells, "text": text}
    (root / "frontier.yaml").write_text(yaml.safe_dump(whole))
    return root


def test_cells_are_tuned_equally_from_one_checkpoint_and_the_rest_is_labelled(recipe, monkeypatch, capsys):
    assert cli.main(["eval", "--frontier", str(recipe / "frontier.yaml"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["cell"]: row for row in result["cells"]}
    assert {name: row["nfe_7_chunks"] for name, row in rows.items()} == {
        "321": 3 + 2 + 5, "321-still": 10, "333-clean": 28, "start": 14,
    }  # fmt: skip
    assert [row["trained"] for row in rows.values()] == [True, True, False, False]
    assert all(row["frechet_paired"] > 0 and 0 <= row["asked"] <= 1 for row in rows.values())
    cards = [checkpoint.read_record(recipe / "out" / name / name)["card"] for name in ("321", "321-still")]
    assert [card["train"]["loss"]["motion"] for card in cards] == [0.2, 0]
    assert all(card["steps"] == 2 and card["train"]["init"].endswith("student") for card in cards)
    made = {p.name for p in (recipe / "out").iterdir()}
    assert {"frontier.json", "frontier.md", "frontier.png", "321", "321-still"} == made
    table = (recipe / "out" / "frontier.md").read_text()
    assert "inference only, weights of 321 |" in table and "inference only, weights of shared" in table

    def again(cfg):
        raise AssertionError(f"{cfg.name} was trained twice")

    monkeypatch.setattr(ablation, "train", again)
    assert ablation.frontier(recipe / "frontier.yaml")["cells"] == result["cells"]
    with pytest.raises(ValueError, match=r"321.*other loss"):
        ablation.frontier(recipe / "frontier.yaml", ["settings=[loss.motion=0.4]"])
    with pytest.raises(ValueError, match=r"321.*other steps"):
        ablation.frontier(recipe / "frontier.yaml", ["steps=3"])


def test_a_frontier_refuses_what_its_yaml_names(recipe, capsys):
    assert cli.main(["eval", "--frontier", str(recipe / "frontier.yaml"), "--clips", "3", "--glance"]) == 1
    assert "--clips, --glance say nothing to a frontier" in capsys.readouterr().err


def test_cells_of_unknown_weights_and_recipes_without_training_are_refused():
    with pytest.raises(ValueError, match="weights of 'x'"):
        AblationConfig("base.yaml", 1, {"a": ablation.Cell(), "b": ablation.Cell(weights="x")})
    with pytest.raises(ValueError, match=r"frontier.*cell"):
        AblationConfig("base.yaml", 1, {"a": ablation.Cell(weights="shared")})


def test_every_cell_is_checked_before_one_is_trained(recipe, monkeypatch):
    monkeypatch.setattr(ablation, "train", lambda stage: pytest.fail("a cell was trained"))
    cells = {"a": {"pattern": "2"}, "b": {"pattern": "9", "weights": "a"}}
    text = yaml.safe_load((recipe / "frontier.yaml").read_text())
    (recipe / "bad.yaml").write_text(yaml.safe_dump({**text, "cells": cells}))
    with pytest.raises(ValueError, match="asks for 9 steps"):
        ablation.frontier(recipe / "bad.yaml")


@pytest.mark.parametrize("family", ["doom", "shapes"])
def test_the_recipes_name_at_least_five_trained_cells_and_stages_that_can_be_built(family):
    cfg = load_config(AblationConfig, f"configs/{family}/frontier.yaml")
    trained = [name for name, cell in cfg.cells.items() if not cell.weights]
    stages = {name: asdict(ablation.stage_of(cfg, name)) for name in trained}
    assert {"4322222", "2222222", "4322222-clean", "4322222-no-motion"} < set(trained) and len(trained) >= 5
    assert len({s["steps"] for s in stages.values()} | {s["init"] for s in stages.values()}) == 2
    assert stages["4322222-no-motion"]["loss"]["motion"] == 0 and stages["4322222"]["loss"]["motion"] > 0


def test_all_stages_of_text_and_diagonal_can_be_built():
    for name in ("codec", "teacher", "tf", "selfforcing", "diagonal"):
        assert load_config(TrainConfig, f"configs/shapes/{name}.yaml").name == f"shapes-{name}"
    for name in ("", "-clean", "-no-motion", "-shared-exit", "-full"):
        assert load_config(TrainConfig, f"configs/doom/diagonal{name}.yaml").init == "doom-selfforcing"
    assert load_config(TrainConfig, "configs/wan/diagonal.yaml").schedule.pattern == "4322222"


def test_every_stage_trains_on_captions(recipe):
    base = {"data": str(recipe / "latents"), "frames": 9, "batch": 2, "steps": 2, "out": str(recipe / "runs")}
    student = {"chunk": 3, "memory": {"policy": "window", "frames": 6}}
    for objective in ("flow", "teacher_forcing"):
        stage = {**base, "name": objective, "objective": objective, "init": str(recipe / "teacher"), "student": student}
        (recipe / "stage.yaml").write_text(yaml.safe_dump(stage))
        path = trainer.train(load_config(TrainConfig, recipe / "stage.yaml"))
        record = checkpoint.read_record(path.with_suffix(""))
        encode, stage_of = checkpoint.text_encoder(record), load_config(TrainConfig, recipe / "stage.yaml")
        own = trainer.Trainer(stage_of)
        batch, words = own.batch(0), [clip["caption"] for clip in own.data.meta["described"]]
        places = [(batch.cond.tokens - tokens).abs().flatten(1).amax(1) < 0.01 for tokens in encode(words)]
        assert torch.stack(places).any(0).all(), "each clip is told a caption, as the encoder of streams reads it"
        old, new = (checkpoint.load(p).net.state_dict() for p in (recipe / "teacher", path))
        name = next(n for n in old if "text" in n and n.endswith("weight"))
        assert not torch.equal(old[name], new[next(n for n in new if n.endswith(name))]), "what reads captions learns"
        assert record["text"]["kind"] == "ngrams" and record["given_frames"] == 0
    (recipe / "stage.yaml").write_text(yaml.safe_dump({**stage, "init": None, "dit": {"channels": 4, "text_dim": 9}}))
    with pytest.raises(ValueError, match="9 numbers"):
        trainer.train(load_config(TrainConfig, recipe / "stage.yaml"))


def test_a_cell_runs_every_field_of_the_schedule_it_names():
    record = {"schedule": asdict(ScheduleConfig(levels=(1.0, 0.5), pattern="21", given_chunks=1))}
    student = Bundle("student", "student", None, record)
    asked = ScheduleConfig(
        name="rolling", levels=(1.0, 0.9, 0.7), context="noised", context_sigma=0.1, exit="none", given_chunks=0
    )
    assert with_schedule(student, asked).schedule == replace(asked, given_chunks=1)
    asked = ScheduleConfig(steps=((1.0, 0.5), (1.0,)), timesteps=((0.9, 0.4), (0.8,)), exit="per_chunk", rewarm=2)
    assert with_schedule(student, asked).schedule == replace(asked, given_chunks=1)
