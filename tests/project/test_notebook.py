"""The notebook of the quickstart, run in short."""

import json

import pytest

from tests.support import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SHORT = {"UPDATES": 2, "SFT_STEPS": 4, "EVAL_PROBLEMS": 8, "PROMPTS": 2, "TRACES": 4}


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        if number == 0:  # its settings
            assert SHORT.keys() <= names.keys()
            names.update(SHORT)
    assert names["trainer"].state.global_step == 2
    assert len(names["before"]) == len(names["after"]) == len(names["config"].eval_budgets)
    assert [answer.budget for answer in names["output"].answers] == [4, 10, 40]


def test_no_output_is_committed():
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])
