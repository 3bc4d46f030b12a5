"""Writes the backbone of a run as the files of the wheel: Hugging Face's layout, matrices in bfloat16.

python tests/benchmarks/nano/pack.py RUN/backbone dinov3_infer/data/nano
"""

import sys
from pathlib import Path

from dinov3_infer import Backbone


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = map(Path, sys.argv[1:])
    folder = Backbone.from_pretrained(source, device="cpu", dtype="bfloat16").save_pretrained(target)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    packed = Backbone.from_pretrained(folder, device="cpu")
    print(f"{weights}: {weights.stat().st_size:,} bytes, fingerprint {packed.fingerprint()}")


if __name__ == "__main__":
    main()
