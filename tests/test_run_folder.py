"""Whether a run folder belongs to the recipe that is to be run in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from composer_se.errors import UserError
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run_folder import check_unchanged, read_finished, write_recipe, write_summary


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def begin(*overrides: str) -> None:
    write_recipe(load_recipe("digits", overrides))


def save_checkpoint(folder: str) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "latest-rank0.pt").touch()


def check(*overrides: str) -> None:
    check_unchanged(load_recipe("digits", overrides))


@pytest.mark.parametrize("elsewhere", [(), ("save_folder=elsewhere",)])
def test_complete_run_without_checkpoints_is_not_taken_for_another_recipes(
    elsewhere: tuple[str, ...],
) -> None:
    begin()
    write_summary(load_recipe("digits"), {})
    with pytest.raises(UserError, match=r"optimizer\.lr \(was 0\.1, now 0\.2\)"):
        check("optimizer.lr=0.2", *elsewhere)
    check(*elsewhere)


def test_checkpoints_in_the_run_folder_count_when_new_ones_go_elsewhere() -> None:
    begin()
    save_checkpoint("runs/digits/checkpoints")
    with pytest.raises(UserError, match=r"seed \(was 17, now 18\)"):
        check("seed=18", "save_folder=elsewhere")


def test_checkpoints_that_went_elsewhere_count() -> None:
    begin("save_folder=elsewhere")
    save_checkpoint("elsewhere")
    with pytest.raises(UserError, match=r"seed \(was 17, now 18\)"):
        check("seed=18", "save_folder=elsewhere")


def test_run_that_saved_nothing_may_be_begun_anew() -> None:
    begin()
    check("seed=18")


def test_run_of_a_version_without_a_key_has_that_keys_default() -> None:
    begin()
    save_checkpoint("runs/digits/checkpoints")
    path = Path("runs/digits/recipe.yaml")
    stored = yaml.safe_load(path.read_text())
    del stored["scale_schedule_ratio"], stored["eval_subset_num_batches"]
    path.write_text(yaml.safe_dump(stored))
    check()
    with pytest.raises(UserError, match=r": scale_schedule_ratio \(was 1\.0, now 0\.5\);"):
        check("scale_schedule_ratio=0.5")


def test_run_of_a_version_with_another_key_is_refused_in_one_line() -> None:
    begin()
    save_checkpoint("runs/digits/checkpoints")
    with Path("runs/digits/recipe.yaml").open("a") as file:
        file.write("steps_per_moon: 3\n")
    with pytest.raises(UserError, match=r"run_name: runs/digits .*steps_per_moon.*run_name=") as error:
        check()
    assert "\n" not in str(error.value)


def test_a_stretched_run_is_complete_after_its_stretched_duration() -> None:
    stretched = ("max_duration=2ep", "scale_schedule_ratio=2")
    for epochs, complete in ((2, False), (4, True)):
        summary = {"max_duration": "1ep", "epoch": epochs, "batch": 0, "sample": 0}
        write_summary(load_recipe("digits"), summary)
        assert (read_finished(load_recipe("digits", stretched)) is not None) is complete
