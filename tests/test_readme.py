"""The README's table of models is made from the zoo: `python tests/test_readme.py` writes it anew."""

import re
from pathlib import Path

import torch
from test_dropin import PATTERNS, SERVED

from dinov3_infer.vit import VisionTransformer
from dinov3_infer.zoo import MODELS

README = Path(__file__).parent.parent / "README.md"
BETWEEN = re.compile(r"(?<=<!-- models -->\n).*(?=<!-- /models -->)", re.DOTALL)


def model_table() -> str:
    lines = [
        "| name | width | blocks | patch | registers | parameters | weights | licence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for info in MODELS.values():
        c = info.config
        with torch.device("meta"):
            millions = sum(p.numel() for p in VisionTransformer(c).parameters()) / 1e6
        home = f"`{info.hub_id or info.timm_id}`" if info.hub_id or info.timm_id else "in this package"
        lines.append(
            f"| `{info.name}` | {c.embed_dim} | {c.depth} | {c.patch_size} | {c.num_registers} "
            f"| {millions:,.1f} M | {home} | {info.licence} |"
        )
    return "\n".join(lines) + "\n"


def test_the_table_of_models_is_that_of_the_zoo() -> None:
    found = BETWEEN.search(README.read_text(encoding="utf-8"))
    assert found is not None and found[0] == model_table(), "run python tests/test_readme.py"


def test_the_count_of_patterns_is_that_of_the_tests() -> None:
    assert f"<!-- dropin -->{SERVED} of {PATTERNS}<!-- /dropin -->" in README.read_text(encoding="utf-8")


def test_the_python_blocks_of_the_readme_are_valid_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


if __name__ == "__main__":
    README.write_text(BETWEEN.sub(lambda _: model_table(), README.read_text(encoding="utf-8")), encoding="utf-8")
