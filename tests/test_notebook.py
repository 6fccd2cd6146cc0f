"""The notebook runs from a clean kernel, what it stores came from the code as it is, and its text agrees.

    python tests/test_notebook.py        # execute it, store its outputs and README's figure
"""

import base64
import hashlib
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from conftest import bt

ROOT = Path(__file__).resolve().parent.parent


def read():
    notebook = nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def origin(notebook) -> str:  # a hash of what outputs depend on: batchtopk.py and the sources of all cells
    sources = [(ROOT / "batchtopk.py").read_text(encoding="utf-8"), *(cell.source for cell in notebook.cells)]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def execute():
    notebook, cells = read()
    options = {"timeout": 1800, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}, **options).execute()
    return notebook, cells


def prose(notebook) -> str:
    """The text that a reader reads, without formulas and commands, in one line."""
    lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").splitlines()
    return " ".join(" ".join(line for line in lines if not line.startswith("    ")).split())


def found(cells) -> tuple[dict, str]:
    """The numbers that cells gave to `show` beside their pictures, and all that cells printed."""
    outputs, n = [output for cell in cells for output in cell.outputs], {}
    for output in outputs:
        n |= output.get("metadata", {}).get("numbers", {})
    return n, "".join(output.get("text", "") for output in outputs)


def is_near(value, number, within=0.1):
    assert within <= 0.1, "a looser check does not check what the text says"
    return abs(value - number) <= within * abs(number)


def of_seeds(n, name, what):
    return [measured[what] for measured in n["planted"][name]]


SMOLLM2, GEMMA = "SmolLM2-135M, after block 15", "Gemma 3 270M, after block 9"

# What the text says, and whether the numbers behind the pictures say the same. Where a sentence gives no
# number the bound is that of its words. Numbers that depend on the training recipe stand in titles.
CLAIMS = {
    "TopK throws away a 7 and a 6": lambda n: n["rule"] == {"topk": [2, 2, 2], "batchtopk": [4, 2, 0]},
    "Before training no direction is found": lambda n: of_seeds(n, "Before training", "found") == [0],
    "With every seed BatchTopK has less error than TopK":
        lambda n: max(of_seeds(n, "BatchTopK", "fvu")) < min(of_seeds(n, "TopK", "fvu")),
    "and still finds fewer directions":
        lambda n: max(of_seeds(n, "BatchTopK", "found")) < min(of_seeds(n, "TopK", "found")),
    "more of its latents are *shared*":
        lambda n: min(of_seeds(n, "BatchTopK", "shared")) > max(of_seeds(n, "TopK", "shared")),
    "while more lie idle": lambda n: min(of_seeds(n, "BatchTopK", "idle")) > max(of_seeds(n, "TopK", "idle")),
    "The more directions are mixed in a sample":
        lambda n: n["first_steps"] == sorted(n["first_steps"]) and n["first_steps"][-1] > 2 * 4,
    "A sample of one direction gets almost nothing": lambda n: n["first_steps"][0] < 0.5,
    "change to BatchTopK after 60 % of the run": lambda n: bt.Config.topk_start == 0.6,
    "finds more directions than BatchTopK from the first step":
        lambda n: min(of_seeds(n, "TopK first", "found")) > max(of_seeds(n, "BatchTopK", "found")),
    "and has less error than either rule alone":
        lambda n: max(of_seeds(n, "TopK first", "fvu")) < min(of_seeds(n, "BatchTopK", "fvu")),
    "The reversed numbers find more, too":
        lambda n: min(of_seeds(n, "reversed first", "found")) > max(of_seeds(n, "BatchTopK", "found")),
    "Our small model is harmless":
        lambda n: n["norms"]["ours"]["first"] < 2 and not n["norms"]["ours"]["large"],
    "148 times as large as the median": lambda n: is_near(n["norms"][SMOLLM2]["first"], 148, 0.01),
    "a few tokens right after it come close": lambda n: n["norms"][SMOLLM2]["large"][-2] == [1, 147.4],
    "In Gemma the large ones come late": lambda n: min(n["norms"][GEMMA]["large"])[0] > 64,
    "1 token in 4000 of SmolLM2": lambda n: is_near(1 / n["norms"][SMOLLM2]["share"], 4000),
    "60 % of the variance": lambda n: is_near(n["norms"][SMOLLM2]["variance"], 0.60),
    "1 token in 1800 of Gemma": lambda n: is_near(1 / n["norms"][GEMMA]["share"], 1800),
    "holds 41 %": lambda n: is_near(n["norms"][GEMMA]["variance"], 0.41),
    "it is under 0.1 %": lambda n: max(n["norms"][name]["share"] for name in (SMOLLM2, GEMMA)) < 0.001,
    "and that only after 60 % of the run": lambda n: bt.Config.topk_start == 0.6,
    "the two runs are one and the same": lambda n: all(is_near(r, 1, 1e-6) for r in n["training"]["ratio"][0]),
    "A few batches later its error is below TopK's, and stays there":
        lambda n: max(n["training"]["ratio"][1][8:]) < 1,
    "BatchTopK leaves less of the variance unexplained than TopK":
        lambda n: n["training"]["held_out"]["batchtopk"] < n["training"]["held_out"]["topk"],
    "The curves begin near 0.8": lambda n: all(is_near(first, 0.8) for first in n["training"]["first"].values()),
    "The curves end lower than the diamonds":
        lambda n: all(n["training"]["last"][m] < n["training"]["held_out"][m] for m in ("batchtopk", "topk")),
    "BatchTopK spreads widely around it": lambda n: n["spread"][0] < 16 and n["spread"][2] > 48,
    "Among the lowest are ` self`, ` def`": lambda n: {" self", " def"} <= set(n["words"]["lowest"]),
    "Among the highest are short names and pieces of words": lambda n: sum(w.isalpha() for w in n["words"]["highest"]) >= 3,
    "The points lie close to z²": lambda n: is_near(n["cost"]["all"], 1),
    "The smallest are worth a third more": lambda n: is_near(n["cost"]["parts"][0] - 1, 1 / 3),
    "Tokens with few latents pay, tokens with many gain":
        lambda n: n["groups"]["ratios"] == sorted(n["groups"]["ratios"], reverse=True)
        and n["groups"]["ratios"][0] > 1 > n["groups"]["ratios"][-1],
    "what they pay is little, and the others gain more":
        lambda n: 0 < 2 * sum(c for c in n["groups"]["changes"] if c > 0) < -sum(
            c for c in n["groups"]["changes"] if c < 0),
    "The value varies little from batch to batch": lambda n: n["theta"]["spread"] < 0.1,
    "= 18 % of this average": lambda n: is_near(n["theta"]["share"], 0.18, 0.03),
    "at the end of this run still only 79 %": lambda n: is_near(1 - 0.99 ** n["theta"]["batches"], 0.79, 0.01),
    "it is within 2 % of the value of the training batches":
        lambda n: is_near(n["theta"]["averages"][0], n["theta"]["late"], 0.02),
    "θ is then too low": lambda n: n["theta"]["averages"][1] < 0.9 * n["theta"]["late"],
    "θ from held-out batches lies above it": lambda n: n["theta"]["calibrated"] > 1.1 * n["theta"]["late"],
    "In batches of 1024 tokens the error is 1 to 2 % smaller than with θ":
        lambda n: 0.98 <= n["batches"][-1] <= 0.99,
    "k = 32 latents are active on the text of the calibration":
        lambda n: is_near(n["factor"]["l0"][0], 32, 0.02),
    "With the running average of training 36 latents would fire":
        lambda n: is_near(n["factor"]["l0"][2], 36, 0.02),
    "and the error *falls*": lambda n: n["factor"]["fvu"][1] < n["factor"]["fvu"][0],
    "leaves less than a tenth of the variance unexplained": lambda n: 0.05 < n["ce"]["fvu"] < 0.1,
    "Beside zeros almost anything looks good":
        lambda n: n["ce"]["ce_clean"] < n["ce"]["ce_sae"] < n["ce"]["ce_mean"] / 2 < n["ce"]["ce_zero"] / 2,
    "Without the auxiliary loss a part of the dictionary dies":
        lambda n: n["dead"]["broken"] > 0.01 and n["dead"]["broken"] > 3 * n["dead"]["batchtopk"],
    "L_aux is large": lambda n: n["dead"]["l_aux"] > 2 * n["dead"]["living"],
    "for the first 70 % of a run":
        lambda n: is_near(max(bt.JUMP_START, bt.Config.topk_start + bt.JUMP_AFTER), 0.7, 1e-6),
    "The two errors in the legend are nearly the same":
        lambda n: is_near(n["training"]["held_out"]["broken"], n["training"]["held_out"]["batchtopk"], 0.02),
    "BatchTopK has less error than TopK every time":
        lambda n: min(n["rivals"]["topk 8"] + n["rivals"]["topk 32"]) > 0,
    "JumpReLU lies close to BatchTopK":
        lambda n: all(abs(sum(n["rivals"][f"jumprelu {k}"])) < sum(n["rivals"][f"topk {k}"]) / 2
                      for k in (8, 32)),
    "fires on a large part of all tokens": lambda n: n["latents"]["densest"] > 0.25,
    "a name found by reading the strongest lines alone is often too narrow":
        lambda n: n["latents"]["weak"] < n["latents"]["strong"] / 2,
}

PRINTED = {  # a sentence, and what was printed
    "not a single bit of the output may change": r"The output is the same, bit for bit: True",
    "1.6 % of the matrix": r"16,384 of 1,048,576 entries are kept: 32 per token",
    "the tokens that get most directions then add up far too many":
        r"the 64 tokens with most latents: error ([2-9]|1\.[5-9])",
    "gives more latents to tokens whose activations are larger": r"latents with ‖x - b_dec‖: 0\.[5-9]",
    "Here is the whole way": r"differ in 0 active entries",
    "The gradients agree to rounding": r"(relative difference \de-0[6-9]\s+(gradient of \w+: )?){4}",
    "At its usual size the row does not change the text": r"0 × \d+: (.*)\n1 × \d+: \1\n",
    "the model goes on as after ` with` on a new line":
        r"a new line: '( self\.assertRaises).*\n(?:.*\n){2}4 × \d+: '\1",
    "which random directions do not bring about": r"(as far in a random direction: (?!['\"] self\.).*\n){3}",
}


@pytest.mark.slow
def test_the_notebook_runs_from_a_clean_kernel():
    execute()  # raises where a cell does


def test_stored_outputs_are_those_of_the_code_as_it_is():
    notebook, cells = read()
    assert notebook.metadata["origin"] == origin(notebook), "run: python tests/test_notebook.py"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    alt = [o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(alt) >= 10 and all(alt), "pictures with descriptions"
    assert not re.search(r"/(home|root|work|Users)/|/tmp/", str(notebook)), "a path of some machine"
    assert max(len(line) for o in outputs for line in o.get("text", "").splitlines() or [""]) <= 110


def test_the_text_agrees_with_the_outputs():
    notebook, cells = read()
    (n, printed), text = found(cells), prose(notebook)
    assert not [claim for claim in (*CLAIMS, *PRINTED) if claim not in text], "the text no longer says this"
    assert not [claim for claim, holds in CLAIMS.items() if not holds(n)], "the numbers say something else"
    assert not [claim for claim, pattern in PRINTED.items() if not re.search(pattern, printed)]


def test_every_percentage_in_the_text_is_checked():
    text = prose(read()[0])
    text = text.replace("5 % too low", "")  # a setting
    claims = [claim for claim in (*CLAIMS, *PRINTED) if claim in text]
    claimed = [text.index(claim) + i for claim in claims for i in range(len(claim))]
    numbers = re.finditer(r"[\d.]+ %", text)
    unchecked = [text[n.start() - 40 : n.end()] for n in numbers if n.start() not in claimed]
    assert not unchecked, "add it to CLAIMS"


def test_the_cell_that_compares_the_readers_rule_knows_right_from_wrong():
    [source] = [cell.source for cell in read()[1] if "def my_rule" in cell.source]
    scope = {"torch": torch, "bt": bt}
    exec(source, scope)

    def three_lines(z, n):
        flat = z.flatten()
        values, places = flat.topk(n)
        return torch.zeros_like(flat).scatter(0, places, values.relu()).view_as(z)

    def without_relu(z, n):
        values, places = z.flatten().topk(n)
        return torch.zeros(z.numel()).scatter(0, places, values).view_as(z)

    assert "right" in scope["compare"](three_lines)
    wrong = [without_relu, lambda z, n: three_lines(z, n).flatten(), lambda z, n: None, lambda z, n: z,
             lambda z, n: bt.row_topk(z, max(1, n // len(z)))]
    assert not [rule for rule in wrong if "right" in scope["compare"](rule)]


def test_the_notebook_is_of_a_length_one_reads_and_shows_short_cells():
    notebook, cells = read()
    nbformat.validate(notebook)
    assert 2000 <= sum(len(c.source.split()) for c in notebook.cells if c.cell_type == "markdown") <= 4000
    assert max(len(line) for c in notebook.cells for line in c.source.splitlines()) <= 110
    assert max(len(cell.source.splitlines()) for cell in cells) <= 25


if __name__ == "__main__":
    notebook, cells = execute()
    [cell] = [cell for cell in cells if "Error of BatchTopK / error of TopK" in cell.source]
    (ROOT / ".figures/why.png").write_bytes(base64.b64decode(cell.outputs[0].data["image/png"]))
    notebook.metadata["origin"] = origin(notebook)
    nbformat.write(notebook, ROOT / "walkthrough.ipynb")
