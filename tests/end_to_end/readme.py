"""
The README's example on a CPU, in a folder where its model and its dataset are tiny local ones of the same names.

`python tests/end_to_end/readme.py` runs it with the installed package, which must not be the one of this checkout.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from tiny import save_tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def example() -> str:
    """The first Python block of the README."""
    found = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found[1].count('output_dir="outputs",') == 1
    return found[1].replace('output_dir="outputs",', 'output_dir="outputs", use_cpu=True,')  # else bf16 asks for a GPU


def run_example(folder: Path) -> str:
    """Run the example in an empty folder; what it printed, and then the file of the package that it imported."""
    code = example()
    model = re.search(r'model="([^"]+)"', code)
    dataset = re.search(r'load_dataset\("([^"]+)"', code)
    assert model is not None
    assert dataset is not None
    save_tiny_model(folder / model[1], max_position_embeddings=512)
    tiny_tokenizer().save_pretrained(folder / model[1])
    (folder / dataset[1]).mkdir(parents=True)
    prompts = [[{"role": "user", "content": f"{i} + {i} = "}] for i in range(8)]
    rows = Dataset.from_dict({"prompt": prompts, "solution": [f"${2 * i}$" for i in range(8)]})
    rows.to_parquet(folder / dataset[1] / "train.parquet")
    code += "\nimport exgrpo_trl\nassert trainer.state.global_step > 0\nprint(exgrpo_trl.__file__)\n"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = run_example(Path(folder))
    installed = Path(output.splitlines()[-1])
    assert installed.is_relative_to(sys.prefix), f"{installed} is not what was installed into {sys.prefix}"
    print(f"{output}The README's example ran with {installed}")


if __name__ == "__main__":
    main()
