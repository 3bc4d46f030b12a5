"""The tables of the README are those of the zoo and of the records.

python tests/end_to_end/test_readme.py     # writes the table of models anew
"""

import re

import torch
from repository import ROOT
from test_other_projects import PATTERNS, SERVED

from benchmarks import cpu
from dinov3_infer import Backbone, ConvNeXtConfig
from dinov3_infer.zoo import MODELS

README = ROOT / "README.md"
BETWEEN = re.compile(r"(?<=<!-- models -->\n).*(?=<!-- /models -->)", re.DOTALL)


def model_table() -> str:
    lines = [
        "| name | width | blocks | patch | registers | parameters | weights | licence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for info in MODELS.values():
        c = info.config
        with torch.device("meta"):
            model = Backbone(c)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        blocks = "+".join(map(str, c.depths)) if isinstance(c, ConvNeXtConfig) else str(c.depth)
        home = f"`{info.hub_id or info.timm_id}`" if info.hub_id or info.timm_id else "in this package"
        lines.append(
            f"| `{info.name}` | {model.embed_dim} | {blocks} | {model.patch_size} | {model.num_register_tokens} "
            f"| {millions:,.1f} M | {home} | {info.licence} |"
        )
    return "\n".join(lines) + "\n"


def test_the_table_of_models_is_that_of_the_zoo() -> None:
    found = BETWEEN.search(README.read_text(encoding="utf-8"))
    assert found is not None and found[0] == model_table(), "run python tests/end_to_end/test_readme.py"


def test_the_table_of_the_contest_is_that_of_its_record() -> None:
    text = README.read_text(encoding="utf-8")
    assert cpu.filled(text, cpu.recorded()) == text, "run python tests/benchmarks/cpu.py --render"
    cells = [
        {"cell": {"model": cpu.MODELS[letter], "pixels": pixels, "batch": 1},
         "results": {"int8, openvino": {"ratio": ratio, "spread": 0.025}}}
        for letter, pixels, ratio in (("B", 224, 1.0), ("S", 512, 1.25), ("S", 224, 1.5))
    ]  # fmt: skip
    rows = cpu.table({"cells": cells}).splitlines()
    assert rows[0] == "| ViT | pixels | batch | openvino int8 |" and len(rows) == 5
    assert rows[2:] == [
        "| S | 224 | 1 | 1.50 ± 0.03 |",
        "| S | 512 | 1 | 1.25 ± 0.03 |",
        "| B | 224 | 1 | 1.00 ± 0.03 |",
    ]


def test_the_count_of_patterns_is_that_of_the_tests() -> None:
    assert f"<!-- dropin -->{SERVED} of {PATTERNS}<!-- /dropin -->" in README.read_text(encoding="utf-8")


def test_the_python_blocks_of_the_readme_are_valid_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


if __name__ == "__main__":
    README.write_text(BETWEEN.sub(lambda _: model_table(), README.read_text(encoding="utf-8")), encoding="utf-8")
